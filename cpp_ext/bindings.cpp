// The Python module dreammix_trt._cpp. Only this file and bindings_*.cpp, which define its part `gpu`, use Python.
// engine/kernels.py passes checked and contiguous arguments; everything that memory safety needs is checked again here.
// The GIL is released during computations.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <climits>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "feather.hpp"
#include "fill.hpp"
#include "gpu/build_info.hpp"
#include "latent_mask.hpp"
#include "merge.hpp"
#include "paste.hpp"
#include "philox.hpp"
#include "resize.hpp"
#include "step.hpp"
#include "tas.hpp"

namespace nb = nanobind;
using namespace nb::literals;
using dmx::ptrdiff_t;

namespace {

template <typename T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<nb::numpy, T>;
using Shape = std::vector<size_t>;

using dmx::require;

template <typename Array>
Shape shape_of(const Array& array) {
    Shape shape;
    for (size_t i = 0; i < array.ndim(); ++i) {
        require(array.shape(i) <= static_cast<size_t>(INT_MAX), "an array side is longer than 2^31 - 1");
        shape.push_back(array.shape(i));
    }
    return shape;
}

// A new array that owns its memory.
template <typename T>
Out<T> empty(const Shape& shape) {
    size_t count = 1;
    for (const size_t side : shape) count *= side;
    std::unique_ptr<T[]> memory(new T[count > 0 ? count : 1]);
    nb::capsule owner(memory.get(), [](void* pointer) noexcept { delete[] static_cast<T*>(pointer); });
    return Out<T>(memory.release(), shape.size(), shape.data(), owner);
}

int side(const Shape& shape, size_t axis) { return static_cast<int>(shape[axis]); }

bool is_rgb(const Shape& shape) { return shape.size() == 3 && shape[2] == 3; }

bool is_mask_of(const Shape& mask, const Shape& picture) {
    return mask.size() == 2 && mask[0] == picture[0] && mask[1] == picture[1];
}

using BoxTuple = std::tuple<int, int, int, int>;

dmx::Box box_within(const BoxTuple& box, const Shape& picture) {
    const auto [r0, r1, c0, c1] = box;
    require(0 <= r0 && r0 < r1 && r1 <= side(picture, 0) && 0 <= c0 && c0 < c1 && c1 <= side(picture, 1),
            "box (row0, row1, col0, col1) is empty or reaches outside the picture");
    return {r0, r1, c0, c1};
}

dmx::Filter filter_named(const std::string& name) {
    if (name == "lanczos") return dmx::Filter::lanczos;
    if (name == "bicubic") return dmx::Filter::bicubic;
    if (name == "bilinear") return dmx::Filter::bilinear;
    throw std::invalid_argument("filter '" + name + "' is none of lanczos, bicubic, bilinear");
}

Out<std::uint8_t> resize(const In<std::uint8_t>& image, int out_h, int out_w, const std::string& filter,
                         const std::optional<BoxTuple>& box) {
    const Shape shape = shape_of(image);
    const bool flat = shape.size() == 2;
    require(flat || (shape.size() == 3 && shape[2] >= 1 && shape[2] <= 4), "image must be (H, W) or (H, W, 1..4)");
    require(out_h > 0 && out_w > 0, "out_h and out_w must be positive");
    const dmx::Box crop = box_within(box.value_or(BoxTuple{0, side(shape, 0), 0, side(shape, 1)}), shape);
    const dmx::Filter chosen = filter_named(filter);
    const int channels = flat ? 1 : side(shape, 2);
    Shape result{static_cast<size_t>(out_h), static_cast<size_t>(out_w)};
    if (!flat) result.push_back(shape[2]);
    auto out = empty<std::uint8_t>(result);
    const ptrdiff_t stride = static_cast<ptrdiff_t>(shape[1]) * channels;
    const nb::gil_scoped_release released;
    dmx::resize({image.data() + crop.row0 * stride + ptrdiff_t{crop.col0} * channels, stride, crop.row1 - crop.row0,
                 crop.col1 - crop.col0, channels},
                out_h, out_w, chosen, out.data());
    return out;
}

Out<std::uint8_t> fill(const In<std::uint8_t>& image, const In<std::uint8_t>& mask,
                       const std::vector<std::pair<int, int>>& cascade) {
    const Shape shape = shape_of(image);
    require(is_rgb(shape), "image must be (H, W, 3)");
    require(is_mask_of(shape_of(mask), shape), "mask must be (H, W) of the image");
    for (const auto& [radius, repeats] : cascade) {
        require(radius >= 0 && radius <= 65535 && repeats >= 0, "cascade radii must lie in 0..65535, repeats be >= 0");
    }
    auto out = empty<std::uint8_t>(shape);
    const nb::gil_scoped_release released;
    std::copy_n(image.data(), image.size(), out.data());
    dmx::HoleFiller filler(out.data(), mask.data(), side(shape, 0), side(shape, 1));
    for (const auto& [radius, repeats] : cascade) filler.apply({radius, repeats});
    return out;
}

Out<float> latent_mask(const In<std::uint8_t>& mask, int factor) {
    const Shape shape = shape_of(mask);
    require(shape.size() == 2, "mask must be (H, W)");
    require(factor > 0 && side(shape, 0) % factor == 0 && side(shape, 1) % factor == 0,
            "mask sides must be multiples of factor");
    const auto step = static_cast<size_t>(factor);
    auto out = empty<float>({shape[0] / step, shape[1] / step});
    const nb::gil_scoped_release released;
    dmx::latent_mask(mask.data(), out.data(), side(shape, 0), side(shape, 1), factor);
    return out;
}

Out<std::uint8_t> feather(const In<std::uint8_t>& mask, int width) {
    const Shape shape = shape_of(mask);
    require(shape.size() == 2, "mask must be (H, W)");
    require(width >= 1 && width <= 32767, "width must lie in 1..32767");
    auto out = empty<std::uint8_t>(shape);
    const nb::gil_scoped_release released;
    dmx::feather(mask.data(), out.data(), side(shape, 0), side(shape, 1), width);
    return out;
}

dmx::LatentShape latent_shape(const Shape& shape) {
    require(shape.size() == 4, "latents must be (N, C, h, w)");
    return {side(shape, 0), side(shape, 1), side(shape, 2), side(shape, 3)};
}

Shape with_rows(Shape shape, size_t rows) {
    shape[0] *= rows;
    return shape;
}

std::pair<Out<float>, Out<float>> blend_scale(const In<float>& x, const In<float>& z_bg, const In<float>& mask,
                                              const In<float>& noise, float sigma) {
    const Shape shape = shape_of(x);
    const dmx::LatentShape latent = latent_shape(shape);
    require(shape_of(z_bg) == shape && shape_of(noise) == shape, "z_bg and noise must have the shape of x");
    require(shape_of(mask) == Shape{shape[0], 1, shape[2], shape[3]}, "mask must be (N, 1, h, w)");
    auto x_in = empty<float>(shape), network_in = empty<float>(with_rows(shape, 2));
    const nb::gil_scoped_release released;
    dmx::blend_scale(latent, x.data(), z_bg.data(), mask.data(), noise.data(), sigma, x_in.data(), network_in.data());
    return {std::move(x_in), std::move(network_in)};
}

std::pair<Out<float>, Out<float>> guided_step(const In<float>& x_in, const In<float>& eps,
                                              const std::optional<In<float>>& x0_prev, const In<float>& noise, float sigma,
                                              float guidance_scale, float blur_alpha, float c_x, float c_x0, float c_dx0,
                                              float c_noise, float guidance_rescale, int rows_per_picture) {
    const Shape shape = shape_of(x_in);
    const dmx::LatentShape latent = latent_shape(shape);
    require(rows_per_picture == 1 || rows_per_picture == 2, "rows_per_picture must be 1 or 2");
    require(shape_of(eps) == with_rows(shape, static_cast<size_t>(rows_per_picture)), "eps must be (rows_per_picture N, C, h, w)");
    require(shape_of(noise) == shape && (!x0_prev || shape_of(*x0_prev) == shape), "noise and x0_prev must have the shape of x_in");
    auto x_out = empty<float>(shape), x0 = empty<float>(shape);
    const nb::gil_scoped_release released;
    dmx::guided_step(latent, x_in.data(), eps.data(), x0_prev ? x0_prev->data() : nullptr, noise.data(),
                     {sigma, guidance_scale, blur_alpha, guidance_rescale, rows_per_picture}, {c_x, c_x0, c_dx0, c_noise},
                     x_out.data(), x0.data());
    return {std::move(x_out), std::move(x0)};
}

Out<float> bilateral(const In<float>& e, const In<float>& guide) {
    const Shape shape = shape_of(e);
    const dmx::LatentShape latent = latent_shape(shape);
    require(shape_of(guide) == shape, "guide must have the shape of e");
    auto out = empty<float>(shape);
    const nb::gil_scoped_release released;
    for (int n = 0; n < latent.pictures; ++n) {
        const ptrdiff_t at = n * latent.picture();
        dmx::bilateral(e.data() + at, guide.data() + at, out.data() + at, latent.channels, latent.height, latent.width);
    }
    return out;
}

Out<float> tas_project(const In<float>& tokens, const In<float>& remove, const In<std::int64_t>& positions) {
    const Shape shape = shape_of(tokens), removed = shape_of(remove);
    require(shape.size() == 2 && removed.size() == 2 && removed[1] == shape[1], "tokens must be (L, D), remove (K, D)");
    require(positions.ndim() == 1, "positions must be (P,)");
    const std::int64_t* rows = positions.data();
    for (size_t p = 0; p < positions.size(); ++p) {
        require(rows[p] >= 0 && rows[p] < side(shape, 0), "a position lies outside the tokens");
    }
    auto out = empty<float>(shape);
    const nb::gil_scoped_release released;
    std::copy_n(tokens.data(), tokens.size(), out.data());
    const auto depth = static_cast<ptrdiff_t>(shape[1]);
    for (size_t k = 0; k < removed[0]; ++k) {
        for (size_t p = 0; p < positions.size(); ++p) {
            dmx::remove_along(out.data() + rows[p] * depth, remove.data() + static_cast<ptrdiff_t>(k) * depth, depth);
        }
    }
    return out;
}

Out<std::uint8_t> paste(const In<std::uint8_t>& original, const In<std::uint8_t>& content, const BoxTuple& box,
                        const In<std::uint8_t>& weight, const std::optional<In<float>>& alpha) {
    const Shape shape = shape_of(original), inner = shape_of(content);
    require(is_rgb(shape) && is_rgb(inner), "original and content must be (H, W, 3)");
    const dmx::Box place = box_within(box, shape);
    require(side(inner, 0) == place.row1 - place.row0 && side(inner, 1) == place.col1 - place.col0, "content must have the size of box");
    require(is_mask_of(shape_of(weight), shape), "weight must be (H, W) of original");
    require(!alpha || is_mask_of(shape_of(*alpha), inner), "alpha must be (h, w) of content");
    auto out = empty<std::uint8_t>(shape);
    const nb::gil_scoped_release released;
    dmx::paste(original.data(), content.data(), place, weight.data(), alpha ? alpha->data() : nullptr, out.data(),
               side(shape, 0), side(shape, 1));
    return out;
}

Out<float> soft_alpha(int height, int width) {
    require(height > 0 && width > 0, "height and width must be positive");
    auto out = empty<float>({static_cast<size_t>(height), static_cast<size_t>(width)});
    const nb::gil_scoped_release released;
    dmx::soft_alpha(out.data(), height, width);
    return out;
}

Out<float> normals(std::uint64_t seed, std::uint32_t draw, std::uint32_t step, const Shape& shape) {
    auto out = empty<float>(shape);
    const nb::gil_scoped_release released;
    dmx::normals(seed, draw, step, out.data(), static_cast<ptrdiff_t>(out.size()));
    return out;
}

// left (rows, rank) and right (rank, columns) into rows of `columns` numbers, `stride` apart, from `at` on.
void merge_weight(const nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>& pristine,
                  const nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu>& out, std::int64_t at, std::int64_t stride,
                  const In<float>& left, const In<float>& right) {
    const bool half = pristine.dtype().bits == 16;
    const auto type = half ? nb::dlpack::dtype{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16, 1} : nb::dtype<float>();
    require(pristine.dtype() == type && out.dtype() == type, "pristine and out must be float32 or float16 both");
    const Shape a = shape_of(left), b = shape_of(right);
    require(a.size() == 2 && b.size() == 2 && a[1] == b[0], "left must be (rows, rank), right (rank, columns)");
    const auto rows = static_cast<std::int64_t>(a[0]), columns = static_cast<std::int64_t>(b[1]);
    const auto count = static_cast<std::int64_t>(pristine.size());
    require(out.size() == pristine.size() && at >= 0 && at <= count && stride >= columns && stride <= count, "the slot is not in the weight");
    if (rows == 0 || columns == 0) return;
    require(at + (rows - 1) * stride + columns <= count, "the slot is not in the weight");
    const auto merge = [&](auto* from, auto* to) {
        dmx::merge_weight(from + at, to + at, static_cast<ptrdiff_t>(stride), static_cast<ptrdiff_t>(rows),
                          static_cast<ptrdiff_t>(columns), left.data(), right.data(), static_cast<int>(a[1]));
    };
    const nb::gil_scoped_release released;
    if (half) {
        merge(static_cast<const dmx::Half*>(pristine.data()), static_cast<dmx::Half*>(out.data()));
    } else {
        merge(static_cast<const float*>(pristine.data()), static_cast<float*>(out.data()));
    }
}

using Block = std::tuple<std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>;

Block philox(const Block& counter, const std::pair<std::uint32_t, std::uint32_t>& key) {
    const auto [c0, c1, c2, c3] = counter;
    const dmx::Words words = dmx::philox({{c0, c1, c2, c3}}, key.first, key.second);
    return {words.word[0], words.word[1], words.word[2], words.word[3]};
}

void set_threads(int count) {
    require(count >= 0, "threads must be >= 0 (0: all)");
    dmx::thread_setting() = count;
}

// {"version", "compiler", "host_features": [...], "cuda": {"toolkit", "architectures": [...], "ptx"} or None}
nb::dict build_info() {
    const dmx::BuildInfo built = dmx::build_info();
    nb::dict info;
    info["version"] = built.version;
    info["compiler"] = built.compiler;
    info["host_features"] = built.host_features;
    info["cuda"] = nb::none();
    if (!built.toolkit.empty()) {
        nb::dict cuda;
        cuda["toolkit"] = built.toolkit;
        cuda["architectures"] = built.architectures;
        cuda["ptx"] = built.ptx;
        info["cuda"] = cuda;
    }
    return info;
}

}  // namespace

NB_MODULE(_cpp, module) {
    module.doc() = "C++ kernels of dreammix_trt; use them through dreammix_trt.engine.kernels.";
    module.def("resize", &resize, "image"_a, "out_h"_a, "out_w"_a, "filter"_a = "lanczos", "box"_a = nb::none());
    module.def("fill", &fill, "image"_a, "mask"_a, "cascade"_a);
    module.def("latent_mask", &latent_mask, "mask"_a, "factor"_a = 8);
    module.def("feather", &feather, "mask"_a, "width"_a = 32);
    module.def("blend_scale", &blend_scale, "x"_a, "z_bg"_a, "mask"_a, "noise"_a, "sigma"_a);
    module.def("guided_step", &guided_step, "x_in"_a, "eps"_a, "x0_prev"_a.none(), "noise"_a, nb::kw_only(), "sigma"_a,
               "guidance_scale"_a, "blur_alpha"_a, "c_x"_a, "c_x0"_a, "c_dx0"_a, "c_noise"_a, "guidance_rescale"_a = 0.0F,
               "rows_per_picture"_a = 2);
    module.def("bilateral", &bilateral, "e"_a, "guide"_a);
    module.def("tas_project", &tas_project, "tokens"_a, "remove"_a, "positions"_a);
    module.def("paste", &paste, "original"_a, "content"_a, "box"_a, "weight"_a, "alpha"_a = nb::none());
    module.def("soft_alpha", &soft_alpha, "height"_a, "width"_a);
    module.def("merge_weight", &merge_weight, "pristine"_a, "out"_a, "at"_a, "stride"_a, "left"_a, "right"_a);
    module.def("normals", &normals, "seed"_a, "draw"_a, "step"_a, "shape"_a);
    module.def("philox", &philox, "counter"_a, "key"_a);
    module.def("set_threads", &set_threads, "count"_a);
    module.def("build_info", &build_info, nb::sig("def build_info() -> dict[str, typing.Any]"));
    nb::module_ gpu = module.def_submodule("gpu", "Kernels of the device runtime, in a CUDA stream or on the host.");
    dmx::bind_pictures(gpu);
    dmx::bind_numbers(gpu);
}
