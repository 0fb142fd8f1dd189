// Prompt tokens: joins the outputs of both text encoders, weighs them, and removes attributes.
#pragma once

#include "group.hpp"
#include "latents.hpp"

namespace dmx {

// out row = [first row | second row], float.
struct JoinText {
    Reals first, second;
    float* out;
    int rows, first_width, second_width;
    std::int32_t *flags, first_bit, second_bit;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int width = first_width + second_width;
        std::int32_t bits = 0;
        for (ptrdiff_t i = first_of(group); i < ptrdiff_t{rows} * width; i += stride_of(group)) {
            const ptrdiff_t row = i / width, column = i % width;
            const bool left = column < first_width;
            const float value = left ? first[row * first_width + column] : second[row * second_width + column - first_width];
            out[i] = value;
            if (!is_finite(value)) bits |= left ? first_bit : second_bit;
        }
        if (bits != 0) group.set_bits(flags, bits);
    }
};

// Row t of `tokens` becomes e + w (t - e), e that row of the empty prompt. weights: `rows` of the first encoder, whose
// numbers lead each row, then `rows` of the second. A weight of 1 leaves the numbers as they are.
struct WeighText {
    float* tokens;
    const float *empty, *weights;
    int rows, first_width, width;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (ptrdiff_t i = first_of(group); i < ptrdiff_t{rows} * width; i += stride_of(group)) {
            const ptrdiff_t row = i / width;
            const float weight = weights[i % width < first_width ? row : rows + row];
            if (weight != 1.0F) tokens[i] = empty[i] + weight * (tokens[i] - empty[i]);
        }
    }
};

// ../tas.hpp with one block per token: removes unwanted tokens, rows of `removed`, from rows of `tokens`, one after the
// other. plan: K, P, the K rows of `removed` (in `rows` places), the P rows of `tokens` (in `rows` places). Rows outside
// the arrays are skipped. A token named twice is projected once, which gives the same result.
struct Tas {
    float* tokens;
    const float* removed;
    const std::int32_t* plan;
    int rows, width;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int count = clamped(plan[0], 0, rows), projected = clamped(plan[1], 0, rows);
        const std::int32_t *unwanted = plan + 2, *wanted = unwanted + rows;
        for (int p = group.block; p < projected; p += group.blocks) {
            if (!is_row(wanted[p]) || named_before(wanted, p)) continue;
            float* token = tokens + ptrdiff_t{wanted[p]} * width;
            for (int k = 0; k < count; ++k) {
                if (is_row(unwanted[k])) remove(group, token, removed + ptrdiff_t{unwanted[k]} * width);
            }
        }
    }

  private:
    DMX_HD bool is_row(std::int32_t row) const { return row >= 0 && row < rows; }

    DMX_HD static bool named_before(const std::int32_t* wanted, int p) {
        for (int before = 0; before < p; ++before) {
            if (wanted[before] == wanted[p]) return true;
        }
        return false;
    }

    // Each number of the token belongs to one thread throughout, so only the sums need a sync.
    template <class Group>
    DMX_HD void remove(Group& group, float* token, const float* direction) const {
        auto* scratch = reinterpret_cast<double*>(group.shared);
        double length2 = 0.0, along = 0.0;
        for (int i = group.thread; i < width; i += group.threads) {
            const double part = direction[i];
            length2 += part * part;
            along += static_cast<double>(token[i]) * part;
        }
        length2 = block_sum(group, length2, scratch);
        along = block_sum(group, along, scratch);
        if (!(length2 > 0.0)) return;
        const double share = along / length2;
        for (int i = group.thread; i < width; i += group.threads) {
            token[i] = static_cast<float>(token[i] - share * direction[i]);
        }
    }
};

}  // namespace dmx
