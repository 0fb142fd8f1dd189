// Fills the hole with a cascade of box blurs, coarse to fine; the known pixels are restored after each
// (docs/algorithm.md, 3.6). Bit-equal to Pillow's BoxBlur: two passes, each rounded to 8 bit, 24-bit weights.
//
// Only pixels of the hole are needed. So the horizontal pass runs on the columns of the hole's bounding box and on the
// rows that the windows reach. Rows without a hole never change and are blurred once per radius.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.hpp"

namespace dmx {

struct Blur {
    int radius;
    int repeats;
};

struct BoxWeights {
    std::uint32_t inner;  // of the 2r+1 pixels of the window
    std::uint32_t outer;  // of the two pixels just outside: the rest from rounding `inner`
};

// Pillow divides in single precision; so do we.
inline BoxWeights box_weights(int radius) {
    const float width = static_cast<float>(radius) * 2.0F + 1.0F;
    const auto inner = static_cast<std::uint32_t>(16777216.0F / width);
    return {inner, ((1U << 24) - static_cast<std::uint32_t>(2 * radius + 1) * inner) / 2};
}

DMX_HD inline std::uint8_t box_value(std::uint32_t window, std::uint32_t outside, BoxWeights weights) {
    return static_cast<std::uint8_t>((window * weights.inner + outside * weights.outer + (1U << 23)) >> 24);
}

namespace fill_detail {

constexpr int channels = 3;

// The sums of one line. `line` has `inputs` bytes from (first output - radius - 1) to (last output + radius + 1), with
// repeated edges. `window[i]` becomes the sum of the 2r+1 pixels around output byte i. A running sum would not
// vectorise, so the window is composed of sums of 1, 2, 4, ... pixels in `part`, by the binary digits of its width.
// Sixteen bits are enough for windows up to 257 pixels.
constexpr int largest_short_radius = 128;

static DMX_CLONES void start_windows(const std::uint8_t* DMX_RESTRICT line, std::uint16_t* DMX_RESTRICT part, int inputs) {
    for (int i = 0; i < inputs; ++i) part[i] = line[i];
}

static DMX_CLONES void double_windows(const std::uint16_t* DMX_RESTRICT part, std::uint16_t* DMX_RESTRICT twice, int shift,
                                      int count) {
    for (int i = 0; i < count; ++i) twice[i] = static_cast<std::uint16_t>(part[i] + part[i + shift]);
}

static DMX_CLONES void widen_windows(const std::uint16_t* DMX_RESTRICT part, std::uint16_t* DMX_RESTRICT window, int count) {
    for (int i = 0; i < count; ++i) window[i] = static_cast<std::uint16_t>(window[i] + part[i]);
}

// `part` and `twice` are scratch of `inputs` elements.
inline void sum_windows_short(const std::uint8_t* line, std::uint16_t* part, std::uint16_t* twice, std::uint16_t* window,
                              int inputs, int outputs, int radius) {
    int start = channels;  // the window begins one pixel after the pixel outside it
    start_windows(line, part, inputs);
    std::copy_n(part + start, outputs, window);
    start += channels;
    for (int digit = 2, valid = inputs - channels; digit <= 2 * radius + 1; digit *= 2) {
        double_windows(part, twice, digit / 2 * channels, valid);
        std::swap(part, twice);
        valid -= digit * channels;
        if (((2 * radius + 1) & digit) == 0) continue;
        widen_windows(part + start, window, outputs);
        start += digit * channels;
    }
}

// Wider windows are differences of a prefix sum.
static DMX_CLONES void sum_windows_long(const std::uint8_t* DMX_RESTRICT line, std::uint32_t* DMX_RESTRICT prefix,
                                        std::uint32_t* DMX_RESTRICT window, int inputs, int outputs, int radius) {
    std::uint32_t red = 0, green = 0, blue = 0;
    for (int i = 0; i < inputs; i += channels) {
        prefix[i] = red, prefix[i + 1] = green, prefix[i + 2] = blue;
        red += line[i], green += line[i + 1], blue += line[i + 2];
    }
    const int beyond = channels * (2 * radius + 2);
    for (int i = 0; i < outputs; ++i) window[i] = prefix[i + beyond] - prefix[i + channels];
}

// The outputs of one line from its window sums and the pixels just outside the windows.
static DMX_CLONES void blur_short(const std::uint16_t* DMX_RESTRICT window, const std::uint8_t* DMX_RESTRICT line,
                                  std::uint8_t* DMX_RESTRICT out, int outputs, int radius, BoxWeights weights) {
    const int beyond = channels * (2 * radius + 2);
    for (int i = 0; i < outputs; ++i) out[i] = box_value(window[i], std::uint32_t{line[i]} + line[i + beyond], weights);
}

static DMX_CLONES void blur_long(const std::uint32_t* DMX_RESTRICT window, const std::uint8_t* DMX_RESTRICT line,
                                 std::uint8_t* DMX_RESTRICT out, int outputs, int radius, BoxWeights weights) {
    const int beyond = channels * (2 * radius + 2);
    for (int i = 0; i < outputs; ++i) out[i] = box_value(window[i], std::uint32_t{line[i]} + line[i + beyond], weights);
}

// Blurs lines of one length and radius.
class LineBlur {
  public:
    LineBlur(int pixels, int radius) : inputs_(channels * (pixels + 2 * radius + 2)), outputs_(channels * pixels), radius_(radius) {
        const auto inputs = static_cast<size_t>(inputs_);
        if (radius <= largest_short_radius) {
            short_part_.resize(inputs), short_twice_.resize(inputs), short_window_.resize(inputs);
        } else {
            long_part_.resize(inputs), long_window_.resize(inputs);
        }
    }

    void apply(const std::uint8_t* line, std::uint8_t* out, BoxWeights weights) {
        if (radius_ <= largest_short_radius) {
            sum_windows_short(line, short_part_.data(), short_twice_.data(), short_window_.data(), inputs_, outputs_,
                              radius_);
            blur_short(short_window_.data(), line, out, outputs_, radius_, weights);
        } else {
            sum_windows_long(line, long_part_.data(), long_window_.data(), inputs_, outputs_, radius_);
            blur_long(long_window_.data(), line, out, outputs_, radius_, weights);
        }
    }

  private:
    int inputs_, outputs_, radius_;
    std::vector<std::uint16_t> short_part_, short_twice_, short_window_;
    std::vector<std::uint32_t> long_part_, long_window_;
};

static DMX_CLONES void add_rows(std::uint32_t* DMX_RESTRICT sum, const std::uint8_t* DMX_RESTRICT row, ptrdiff_t count,
                                std::uint32_t times) {
    for (ptrdiff_t i = 0; i < count; ++i) sum[i] += row[i] * times;
}

// One output row: the window moves down by one, and hole bytes (hole = 255) take the new value.
static DMX_CLONES void blur_row(std::uint32_t* DMX_RESTRICT sum, const std::uint8_t* DMX_RESTRICT above,
                                const std::uint8_t* DMX_RESTRICT entering, const std::uint8_t* DMX_RESTRICT below,
                                const std::uint8_t* DMX_RESTRICT hole, std::uint8_t* DMX_RESTRICT out, ptrdiff_t count,
                                BoxWeights weights) {
    for (ptrdiff_t i = 0; i < count; ++i) {
        const std::uint32_t window = sum[i] + entering[i] - above[i];
        sum[i] = window;
        const std::uint8_t value = box_value(window, std::uint32_t{above[i]} + below[i], weights);
        out[i] = static_cast<std::uint8_t>((value & hole[i]) | (out[i] & ~hole[i]));
    }
}

}  // namespace fill_detail

class HoleFiller {
  public:
    // `picture` (height, width, 3) is filled in place where `mask` (height, width) >= 127.
    HoleFiller(std::uint8_t* picture, const std::uint8_t* mask, int height, int width)
        : picture_(picture), height_(height), width_(width), holed_(static_cast<size_t>(height), 0) {
        find_hole(mask);
        if (empty()) return;
        stride_ = ptrdiff_t{3} * (col1_ - col0_);
        blurred_.resize(static_cast<size_t>(height_ * stride_));
        hole_.resize(static_cast<size_t>((row1_ - row0_) * stride_));
        for (int y = row0_; y < row1_; ++y) {
            for (int x = col0_; x < col1_; ++x) {
                std::uint8_t* at = hole_.data() + (y - row0_) * stride_ + ptrdiff_t{3} * (x - col0_);
                at[0] = at[1] = at[2] = mask[ptrdiff_t{y} * width_ + x] >= 127 ? 255 : 0;
            }
        }
    }

    void apply(Blur blur) {
        if (empty()) return;
        const BoxWeights weights = box_weights(blur.radius);
        for (int repeat = 0; repeat < blur.repeats; ++repeat) {
            blur_horizontally(blur.radius, weights, repeat == 0);
            blur_vertically(blur.radius, weights);
        }
    }

  private:
    bool empty() const { return row0_ >= row1_; }

    void find_hole(const std::uint8_t* mask) {
        row0_ = height_, row1_ = 0, col0_ = width_, col1_ = 0;
        for (int y = 0; y < height_; ++y) {
            const std::uint8_t* row = mask + ptrdiff_t{y} * width_;
            int first = 0, last = width_ - 1;
            while (first < width_ && row[first] < 127) ++first;
            if (first == width_) continue;
            while (row[last] < 127) --last;
            holed_[static_cast<size_t>(y)] = 1;
            row0_ = std::min(row0_, y), row1_ = y + 1;
            col0_ = std::min(col0_, first), col1_ = std::max(col1_, last + 1);
        }
    }

    const std::uint8_t* blurred_row(int y) const { return blurred_.data() + clamped(y, 0, height_ - 1) * stride_; }

    void blur_horizontally(int radius, BoxWeights weights, bool all_rows) {
        const int first = std::max(0, row0_ - radius - 1), last = std::min(height_, row1_ + radius + 1);
        const int pixels = col1_ - col0_ + 2 * radius + 2;
        const ptrdiff_t grain = 1 + 200000 / (3 * pixels);
        parallel_for(last - first, grain, [&](ptrdiff_t begin, ptrdiff_t end) {
            std::vector<std::uint8_t> line(static_cast<size_t>(3 * pixels));
            fill_detail::LineBlur blur(col1_ - col0_, radius);
            for (int y = first + static_cast<int>(begin); y < first + static_cast<int>(end); ++y) {
                if (!all_rows && holed_[static_cast<size_t>(y)] == 0) continue;
                copy_line(y, col0_ - radius - 1, pixels, line.data());
                blur.apply(line.data(), blurred_.data() + y * stride_, weights);
            }
        });
    }

    void copy_line(int y, int start, int pixels, std::uint8_t* line) const {
        const std::uint8_t* row = picture_ + ptrdiff_t{3} * y * width_;
        const int left = clamped(-start, 0, pixels), inside = clamped(width_ - start, left, pixels);
        for (int i = 0; i < left; ++i) std::memcpy(line + 3 * i, row, 3);
        if (inside > left) {
            std::memcpy(line + 3 * left, row + 3 * (start + left), 3 * static_cast<size_t>(inside - left));
        }
        for (int i = inside; i < pixels; ++i) std::memcpy(line + 3 * i, row + 3 * (width_ - 1), 3);
    }

    void blur_vertically(int radius, BoxWeights weights) {
        const ptrdiff_t grain = 64 + 200000 / (row1_ - row0_);
        parallel_for(stride_, grain, [&](ptrdiff_t begin, ptrdiff_t end) {
            const ptrdiff_t count = end - begin;
            std::vector<std::uint32_t> sum(static_cast<size_t>(count), 0);
            start_window(sum, radius, begin);
            for (int y = row0_; y < row1_; ++y) {
                fill_detail::blur_row(sum.data(), blurred_row(y - radius - 1) + begin, blurred_row(y + radius) + begin,
                                      blurred_row(y + radius + 1) + begin, hole_.data() + (y - row0_) * stride_ + begin,
                                      picture_ + ptrdiff_t{3} * (ptrdiff_t{y} * width_ + col0_) + begin, count, weights);
            }
        });
    }

    // The window one row above the hole. Where it overhangs the picture, the first or last row is repeated.
    void start_window(std::vector<std::uint32_t>& sum, int radius, ptrdiff_t begin) const {
        const int low = row0_ - 1 - radius, high = row0_ - 1 + radius;
        for (int row = clamped(low, 0, height_ - 1); row <= clamped(high, 0, height_ - 1); ++row) {
            const int from = row == 0 ? low : std::max(row, low), to = row == height_ - 1 ? high : std::min(row, high);
            fill_detail::add_rows(sum.data(), blurred_row(row) + begin, static_cast<ptrdiff_t>(sum.size()),
                                  static_cast<std::uint32_t>(to - from + 1));
        }
    }

    std::uint8_t* picture_;
    int height_, width_;
    int row0_ = 0, row1_ = 0, col0_ = 0, col1_ = 0;  // bounding box of the hole, ends exclusive
    ptrdiff_t stride_ = 0;                            // bytes of one row of the bounding box
    std::vector<std::uint8_t> holed_;                 // per row of the picture: whether it has a hole pixel
    std::vector<std::uint8_t> blurred_;               // the horizontal pass: all rows, columns of the bounding box
    std::vector<std::uint8_t> hole_;                  // 255 on bytes of the hole, within the bounding box
};

}  // namespace dmx
