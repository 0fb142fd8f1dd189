// The records kernels read from device memory; engine/gpu/records.py says what each field means and repeats the layout.
#pragma once

#include "../common.hpp"

namespace dmx {

struct Cut {
    std::int32_t height, width, row0, row1, col0, col1, out_height, out_width, vertically_first;
    std::int32_t rows_at, rows_most, cols_at, cols_most, unused[3];
};

struct Sheet {
    std::int32_t height, width, row0, row1, col0, col1, soft, keeps_local;
    std::int32_t local_row0, local_row1, local_col0, local_col1, unused[4];
};

struct Field {
    std::int32_t height, width, reach, row0, row1, col0, col1, unused;
};

struct Job {
    std::uint64_t seed;
    float start_scale, hand_over_sigma;
    std::int32_t samples_vae, blends_output, size_height, size_width, target, unused;
};

struct StepRow {
    float sigma, timestep, size_scale_positive, size_scale_negative, guidance_scale, guidance_rescale;
    float blur_alpha, c_x, c_x0, c_dx0, c_noise;
    std::int32_t blend_step, solver_step, unused[3];
};

struct Segment {
    std::int64_t source, target, size;
};

struct Factor {
    std::int64_t source, target;
    std::int32_t rows, cols, target_rows, target_cols;
    float scale;
    std::int32_t unused;
};

// The numbers of core/noise.py's DRAWS.
enum class Draw : std::uint32_t {
    init = 0, blend = 1, solver = 2, renoise = 3, lcg_fill = 4, lcg_masked = 5, switch_global = 6, gch_background = 7,
    gch_masked = 8,
};

static_assert(sizeof(Cut) == 64 && sizeof(Sheet) == 64 && sizeof(Field) == 32 && sizeof(Job) == 40);
static_assert(sizeof(StepRow) == 64 && sizeof(Segment) == 24 && sizeof(Factor) == 40);

}  // namespace dmx
