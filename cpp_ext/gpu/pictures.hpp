// The kernels on pictures (8 bit, channels last) and masks. Each function enqueues launches and returns; on the host it
// runs immediately (see Place). Results equal those of the host functions of the same name, byte for byte.
#pragma once

#include <vector>

#include "../fill.hpp"
#include "launch.hpp"
#include "records.hpp"

namespace dmx::gpu {

// Crops, resizes like resize() with Lanczos, and converts to the networks' range. Any output may be null.
struct CutArgs {
    const std::uint8_t* source;
    int channels;                // 3, or 1
    const Cut* cut;
    const std::int32_t* tables;  // resampling of both axes, see engine/device/records.py
    std::uint8_t* out;           // (out_height, out_width, channels)
    const std::uint8_t* mask;    // (out_height, out_width): hides pixels of `masked`
    void *network, *masked;      // (1, 3, out_height, out_width) in [-1, 1]
    int half;
    int threshold;               // for one channel: above 127 becomes 255, the rest 0
    std::int32_t* found;         // with threshold: set to 1 if any pixel is 255, else unchanged
};
void cut(const CutArgs& args, Place place);

// For a mask that was lost in resampling (*found is 0): sets every pixel of `out` that a repainted pixel falls into.
struct SpeckArgs {
    const std::uint8_t* source;
    const Cut* cut;
    const std::int32_t* found;
    std::uint8_t* out;
};
void keep_speck(const SpeckArgs& args, Place place);

struct NormaliseArgs {
    const std::uint8_t *picture, *mask;
    void *network, *masked;  // either may be null
    int height, width, half;
};
void normalise(const NormaliseArgs& args, Place place);

// Does fill() in place. `scratch` is aligned to 16 bytes. Two launches per blur, and two before.
struct FillArgs {
    std::uint8_t* picture;
    const std::uint8_t* mask;
    void* scratch;
    int height, width;
};
// Enough for (height, width), and for every picture with at most as many pixels and sides of 8 or more.
std::size_t fill_scratch(int height, int width);
void fill(const FillArgs& args, const std::vector<Blur>& cascade, Place place);

struct LatentMaskArgs {
    const std::uint8_t* mask;
    float* out;     // either may be null
    void* network;
    int height, width, factor, half;
};
void latent_mask(const LatentMaskArgs& args, Place place);

// Distances along rows, then along columns: two launches, three for a seam.
struct FeatherArgs {
    const std::uint8_t* mask;
    const Field* field;
    std::uint16_t* scratch;  // one for each pixel
    std::uint8_t* out;
    int dilate;              // 255 up to the reach, instead of weights
};
std::size_t distance_scratch(std::int64_t most_pixels);
void feather(const FeatherArgs& args, Place place);

struct SeamArgs {
    const std::uint8_t* mask;
    const Field* field;
    std::uint16_t* scratch;
    std::int32_t* deepest;  // scratch, too
    std::uint8_t* out;
};
void seam(const SeamArgs& args, Place place);

// Pastes a stage's content into the picture, or local and global content joined along the seam.
struct PasteArgs {
    const std::uint8_t *original, *content;
    const std::uint8_t *local, *seam;  // read only where the sheet keeps local content
    const std::uint8_t* weight;
    const Sheet* sheet;
    std::uint8_t* out;
};
void paste(const PasteArgs& args, Place place);

struct DecodedArgs {
    const void* image;
    std::uint8_t* out;
    int height, width, half;
    std::int32_t *flags, bit;
};
void decoded(const DecodedArgs& args, Place place);

struct Tile {
    int channels, height, width, row, col, tile_height, tile_width;
};

struct TakeTileArgs {
    const void* source;
    void* out;
    Tile tile;
    int source_half, out_half;
};
void take_tile(const TakeTileArgs& args, Place place);

struct AddTileArgs {
    const void* values;
    const float *ramp_rows, *ramp_cols;
    float* out;
    Tile tile;
    int half;
};
void add_tile(const AddTileArgs& args, Place place);

}  // namespace dmx::gpu
