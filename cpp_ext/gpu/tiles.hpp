// Conversions between 8-bit pictures and the networks' arrays (NCHW, float16 or float32), whole or in tiles.
#pragma once

#include <cmath>

#include "block.hpp"
#include "pictures.hpp"

namespace dmx::gpu {

// An array of the network's type. The branch is the same in all threads and costs nothing next to the memory access.
struct Values {
    void* memory;
    int half;

    DMX_HD void put(ptrdiff_t i, float value) const {
        if (half != 0) {
            static_cast<Half*>(memory)[i] = half_of(value);
        } else {
            static_cast<float*>(memory)[i] = value;
        }
    }
};

struct ConstValues {
    const void* memory;
    int half;

    DMX_HD float get(ptrdiff_t i) const {
        return half != 0 ? float_of(static_cast<const Half*>(memory)[i]) : static_cast<const float*>(memory)[i];
    }
};

DMX_HD inline float latent_range(std::uint8_t value) { return 2.0F * (static_cast<float>(value) / 255.0F) - 1.0F; }

// The value times 0 or 1: a hidden value keeps its sign, as in the host's product.
DMX_HD inline float unless_hidden(float value, std::uint8_t mask) { return value * (mask < 128 ? 1.0F : 0.0F); }

DMX_HD inline std::uint8_t decoded_value(float value) {
    const float share = value / 2.0F + 0.5F;
    const float bounded = share < 0.0F ? 0.0F : share > 1.0F ? 1.0F : share;
    return static_cast<std::uint8_t>(std::rint(bounded * 255.0F));
}

struct Normalise {
    NormaliseArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const NormaliseArgs& a = args;
        const ptrdiff_t plane = ptrdiff_t{a.height} * a.width;
        for_pixels(group, a.height, a.width, [&](int y, int x) {
            const ptrdiff_t pixel = ptrdiff_t{y} * a.width + x;
            const std::uint8_t hidden = a.masked != nullptr ? a.mask[pixel] : std::uint8_t{0};
            for (int c = 0; c < 3; ++c) {
                const float value = latent_range(a.picture[3 * pixel + c]);
                if (a.network != nullptr) Values{a.network, a.half}.put(c * plane + pixel, value);
                if (a.masked != nullptr) Values{a.masked, a.half}.put(c * plane + pixel, unless_hidden(value, hidden));
            }
        });
    }
};

struct Decoded {
    DecodedArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const DecodedArgs& a = args;
        const ptrdiff_t plane = ptrdiff_t{a.height} * a.width;
        bool finite = true;
        for_pixels(group, a.height, a.width, [&](int y, int x) {
            const ptrdiff_t pixel = ptrdiff_t{y} * a.width + x;
            for (int c = 0; c < 3; ++c) {
                const float value = ConstValues{a.image, a.half}.get(c * plane + pixel);
                const bool usable = is_finite(value);
                finite = finite && usable;
                a.out[3 * pixel + c] = usable ? decoded_value(value) : std::uint8_t{0};
            }
        });
        if (!finite) group.set_bits(a.flags, a.bit);
    }
};

// Calls each(index in the whole, index in the tile, y, x within the tile) for every number of a tile.
template <class Group, typename Each>
DMX_HD void for_tile(const Group& group, const Tile& tile, const Each& each) {
    for_pixels(group, tile.channels * tile.tile_height, tile.tile_width, [&](int row, int x) {
        const int channel = row / tile.tile_height, y = row % tile.tile_height;
        const ptrdiff_t whole_row = ptrdiff_t{channel} * tile.height + tile.row + y;
        each(whole_row * tile.width + tile.col + x, ptrdiff_t{row} * tile.tile_width + x, y, x);
    });
}

struct TakeTile {
    TakeTileArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for_tile(group, args.tile, [&](ptrdiff_t whole, ptrdiff_t part, int, int) {
            Values{args.out, args.out_half}.put(part, ConstValues{args.source, args.source_half}.get(whole));
        });
    }
};

struct AddTile {
    AddTileArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for_tile(group, args.tile, [&](ptrdiff_t whole, ptrdiff_t part, int y, int x) {
            args.out[whole] += ConstValues{args.values, args.half}.get(part) * args.ramp_rows[y] * args.ramp_cols[x];
        });
    }
};

}  // namespace dmx::gpu
