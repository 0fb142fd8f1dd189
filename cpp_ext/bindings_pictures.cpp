// The picture kernels as Python calls them: pointers are numbers, 0 means no memory; switches are 0 or 1. The contents
// of device memory cannot be checked here; everything else is.
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "gpu/pictures.hpp"
#include "resize.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace dmx {

namespace {

using Pointer = std::uintptr_t;
using Ints = nb::ndarray<nb::numpy, std::int32_t, nb::ndim<1>>;

template <typename T>
T* needed(Pointer pointer, const char* name) {
    if (pointer == 0) throw std::invalid_argument(std::string(name) + " is 0: it must point to memory");
    if (pointer % alignof(T) != 0) throw std::invalid_argument(std::string(name) + " is not aligned to its type");
    return at<T>(pointer);
}

// Memory of the network's type, or no memory.
void* network_memory(Pointer pointer, int half, const char* name) {
    const bool aligned = pointer % (half != 0 ? 2 : 4) == 0;
    if (!aligned) throw std::invalid_argument(std::string(name) + " is not aligned to its type");
    return at<void>(pointer);
}

void* needed_network(Pointer pointer, int half, const char* name) {
    needed<std::uint8_t>(pointer, name);
    return network_memory(pointer, half, name);
}

void require_size(int height, int width) { require(height > 0 && width > 0, "height and width must be positive"); }

Ints ints_of(const std::vector<int>& values) {
    auto memory = std::make_unique<std::int32_t[]>(values.size() + 1);
    std::copy(values.begin(), values.end(), memory.get());
    const nb::capsule owner(memory.get(), [](void* pointer) noexcept { delete[] static_cast<std::int32_t*>(pointer); });
    return Ints(memory.release(), {values.size()}, owner);
}

std::tuple<Ints, Ints, Ints, int> taps_of(int inputs, int outputs) {
    require(inputs > 0 && outputs > 0, "inputs and outputs must be positive");
    const Taps taps = resize_taps(inputs, outputs, Filter::lanczos);
    return {ints_of(taps.first), ints_of(taps.count), ints_of(taps.weights), taps.most};
}

bool leads_vertically(int height, int width, int out_height, int out_width) {
    require_size(height, width);
    require_size(out_height, out_width);
    return vertically_first(height, width, out_height, out_width);
}

void cut(Pointer source, int channels, Pointer record, Pointer tables, Pointer out, Pointer mask, Pointer network,
         Pointer masked, int half, int threshold, Pointer found, const Stream& stream, int blocks, int threads) {
    require(channels == 1 || channels == 3, "channels must be 1 or 3");
    require(channels == 3 || (network == 0 && masked == 0), "network and masked are made of 3 channels");
    require(channels == 1 || threshold == 0, "threshold is for 1 channel");
    require(threshold != 0 || found == 0, "found is told with threshold only");
    require(masked == 0 || mask != 0, "masked needs mask");
    require(out != 0 || network != 0 || masked != 0, "cut needs one of out, network, masked");
    const gpu::CutArgs args{needed<const std::uint8_t>(source, "source"), channels, needed<const Cut>(record, "cut"),
                            at<const std::int32_t>(tables), at<std::uint8_t>(out), at<const std::uint8_t>(mask),
                            network_memory(network, half, "network"), network_memory(masked, half, "masked"), half,
                            threshold, found == 0 ? nullptr : needed<std::int32_t>(found, "found")};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::cut(args, place);
}

void keep_speck(Pointer source, Pointer record, Pointer found, Pointer out, const Stream& stream, int blocks,
                int threads) {
    const gpu::SpeckArgs args{needed<const std::uint8_t>(source, "source"), needed<const Cut>(record, "cut"),
                              needed<const std::int32_t>(found, "found"), needed<std::uint8_t>(out, "out")};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::keep_speck(args, place);
}

void normalise(Pointer picture, Pointer mask, Pointer network, Pointer masked, int height, int width, int half,
               const Stream& stream, int blocks, int threads) {
    require_size(height, width);
    require(masked == 0 || mask != 0, "masked needs mask");
    require(network != 0 || masked != 0, "normalise needs one of network, masked");
    const gpu::NormaliseArgs args{needed<const std::uint8_t>(picture, "picture"), at<const std::uint8_t>(mask),
                                  network_memory(network, half, "network"), network_memory(masked, half, "masked"),
                                  height, width, half};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::normalise(args, place);
}

std::size_t fill_scratch(int height, int width) {
    require_size(height, width);
    return gpu::fill_scratch(height, width);
}

void fill(Pointer picture, Pointer mask, Pointer scratch, int height, int width,
          const std::vector<std::pair<int, int>>& cascade, const Stream& stream, int blocks, int threads) {
    require_size(height, width);
    std::vector<Blur> blurs;
    for (const auto& [radius, repeats] : cascade) {
        require(radius >= 0 && radius <= 65535 && repeats >= 0, "cascade radii must lie in 0..65535, repeats be >= 0");
        blurs.push_back({radius, repeats});
    }
    require(scratch % 16 == 0, "scratch must be aligned to 16 bytes");
    const gpu::FillArgs args{needed<std::uint8_t>(picture, "picture"), needed<const std::uint8_t>(mask, "mask"),
                             needed<std::uint8_t>(scratch, "scratch"), height, width};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::fill(args, blurs, place);
}

void latent_mask(Pointer mask, Pointer out, Pointer network, int height, int width, int factor, int half,
                 const Stream& stream, int blocks, int threads) {
    require_size(height, width);
    require(factor > 0 && height % factor == 0 && width % factor == 0, "mask sides must be multiples of factor");
    require(out != 0 || network != 0, "latent_mask needs one of out, network");
    const gpu::LatentMaskArgs args{needed<const std::uint8_t>(mask, "mask"),
                                   out == 0 ? nullptr : needed<float>(out, "out"),
                                   network_memory(network, half, "network"), height, width, factor, half};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::latent_mask(args, place);
}

std::size_t distance_scratch(std::int64_t most_pixels) {
    require(most_pixels > 0, "most_pixels must be positive");
    return gpu::distance_scratch(most_pixels);
}

void feather(Pointer mask, Pointer field, Pointer scratch, Pointer out, int dilate, const Stream& stream, int blocks,
             int threads) {
    const gpu::FeatherArgs args{needed<const std::uint8_t>(mask, "mask"), needed<const Field>(field, "field"),
                                needed<std::uint16_t>(scratch, "scratch"), needed<std::uint8_t>(out, "out"), dilate};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::feather(args, place);
}

void seam(Pointer mask, Pointer field, Pointer scratch, Pointer deepest, Pointer out, const Stream& stream, int blocks,
          int threads) {
    const gpu::SeamArgs args{needed<const std::uint8_t>(mask, "mask"), needed<const Field>(field, "field"),
                             needed<std::uint16_t>(scratch, "scratch"), needed<std::int32_t>(deepest, "deepest"),
                             needed<std::uint8_t>(out, "out")};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::seam(args, place);
}

void paste(Pointer original, Pointer content, Pointer local, Pointer seam, Pointer weight, Pointer sheet, Pointer out,
           const Stream& stream, int blocks, int threads) {
    require((local == 0) == (seam == 0), "local and seam go together");
    const gpu::PasteArgs args{needed<const std::uint8_t>(original, "original"),
                              needed<const std::uint8_t>(content, "content"), at<const std::uint8_t>(local),
                              at<const std::uint8_t>(seam), needed<const std::uint8_t>(weight, "weight"),
                              needed<const Sheet>(sheet, "sheet"), needed<std::uint8_t>(out, "out")};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::paste(args, place);
}

void decoded(Pointer image, Pointer out, int height, int width, int half, Pointer flags, int bit, const Stream& stream,
             int blocks, int threads) {
    require_size(height, width);
    const gpu::DecodedArgs args{needed_network(image, half, "image"), needed<std::uint8_t>(out, "out"), height, width,
                                half, needed<std::int32_t>(flags, "flags"), bit};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::decoded(args, place);
}

gpu::Tile tile_within(int channels, int height, int width, int row, int col, int tile_height, int tile_width) {
    require_size(height, width);
    require_size(tile_height, tile_width);
    require(channels > 0, "channels must be positive");
    require(row >= 0 && col >= 0 && tile_height <= height - row && tile_width <= width - col,
            "the tile reaches outside (height, width)");
    return {channels, height, width, row, col, tile_height, tile_width};
}

void take_tile(Pointer source, Pointer out, int channels, int height, int width, int row, int col, int tile_height,
               int tile_width, int source_half, int out_half, const Stream& stream, int blocks, int threads) {
    const gpu::TakeTileArgs args{needed_network(source, source_half, "source"), needed_network(out, out_half, "out"),
                                 tile_within(channels, height, width, row, col, tile_height, tile_width), source_half,
                                 out_half};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::take_tile(args, place);
}

void add_tile(Pointer tile, Pointer ramp_rows, Pointer ramp_cols, Pointer out, int channels, int height, int width,
              int row, int col, int tile_height, int tile_width, int half, const Stream& stream, int blocks,
              int threads) {
    const gpu::AddTileArgs args{needed_network(tile, half, "tile"), needed<const float>(ramp_rows, "ramp_rows"),
                                needed<const float>(ramp_cols, "ramp_cols"), needed<float>(out, "out"),
                                tile_within(channels, height, width, row, col, tile_height, tile_width), half};
    const Place place = place_of(stream, blocks, threads);
    const nb::gil_scoped_release released;
    gpu::add_tile(args, place);
}

// Defines a kernel: keyword arguments, then where it runs.
template <typename Function, typename... Args>
void def(nb::module_& gpu, const char* name, Function function, const Args&... args) {
    gpu.def(name, function, nb::kw_only(), args..., "stream"_a = nb::none(), "blocks"_a = 1, "threads"_a = 1);
}

}  // namespace

void bind_pictures(nb::module_& gpu) {
    gpu.def("resize_taps", &taps_of, "inputs"_a, "outputs"_a);
    gpu.def("vertically_first", &leads_vertically, "height"_a, "width"_a, "out_height"_a, "out_width"_a);
    gpu.def("fill_scratch", &fill_scratch, "height"_a, "width"_a);
    gpu.def("distance_scratch", &distance_scratch, "most_pixels"_a);
    def(gpu, "cut", &cut, "source"_a, "channels"_a, "cut"_a, "tables"_a, "out"_a = 0, "mask"_a = 0, "network"_a = 0,
        "masked"_a = 0, "half"_a = 0, "threshold"_a = 0, "found"_a = 0);
    def(gpu, "keep_speck", &keep_speck, "source"_a, "cut"_a, "found"_a, "out"_a);
    def(gpu, "normalise", &normalise, "picture"_a, "mask"_a = 0, "network"_a = 0, "masked"_a = 0, "height"_a, "width"_a,
        "half"_a);
    def(gpu, "fill", &fill, "picture"_a, "mask"_a, "scratch"_a, "height"_a, "width"_a, "cascade"_a);
    def(gpu, "latent_mask", &latent_mask, "mask"_a, "out"_a = 0, "network"_a = 0, "height"_a, "width"_a, "factor"_a = 8,
        "half"_a = 0);
    def(gpu, "feather", &feather, "mask"_a, "field"_a, "scratch"_a, "out"_a, "dilate"_a = 0);
    def(gpu, "seam", &seam, "mask"_a, "field"_a, "scratch"_a, "deepest"_a, "out"_a);
    def(gpu, "paste", &paste, "original"_a, "content"_a, "local"_a = 0, "seam"_a = 0, "weight"_a, "sheet"_a, "out"_a);
    def(gpu, "decoded", &decoded, "image"_a, "out"_a, "height"_a, "width"_a, "half"_a, "flags"_a, "bit"_a);
    def(gpu, "take_tile", &take_tile, "source"_a, "out"_a, "channels"_a, "height"_a, "width"_a, "row"_a, "col"_a,
        "tile_height"_a, "tile_width"_a, "source_half"_a, "out_half"_a);
    def(gpu, "add_tile", &add_tile, "tile"_a, "ramp_rows"_a, "ramp_cols"_a, "out"_a, "channels"_a, "height"_a,
        "width"_a, "row"_a, "col"_a, "tile_height"_a, "tile_width"_a, "half"_a);
}

}  // namespace dmx
