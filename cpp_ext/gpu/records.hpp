// The records that kernels read from device memory. engine/device/records.py explains the fields and repeats the
// layout.
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
    std::int32_t samples_vae, blends_output;
};

struct StepRow {
    float sigma, timestep, guidance_scale, guidance_rescale, blur_alpha, c_x, c_x0, c_dx0, c_noise;
    float time_ids[2][6];  // of the negative and the positive row
    std::int32_t blend_step, solver_step, unused;
};

struct Merge {
    enum Kind : std::int32_t { floats, halves, eighths };
    const void* source;
    void* target;
    const float *left, *right;
    std::int64_t stride;
    std::int32_t rows, columns, rank, kind, first;
    float left_scale, right_scale, out_scale;
};

// The draws that kernels choose themselves, with the numbers of DRAWS in core/noise.py (a test compares them). The
// other draws are arguments.
enum class Draw : std::uint32_t { init = 0, blend = 1, solver = 2, renoise = 3 };

static_assert(sizeof(Cut) == 64 && sizeof(Sheet) == 64 && sizeof(Field) == 32 && sizeof(Job) == 24);
static_assert(sizeof(StepRow) == 96 && sizeof(Merge) == 72);

}  // namespace dmx
