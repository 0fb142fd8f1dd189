// One sampling step around the UNet, like ../step.hpp on the host: one launch before the network and one after it. The
// step's number is in device memory, so one captured graph serves every step and schedule.
#pragma once

#include "../step.hpp"
#include "group.hpp"
#include "latents.hpp"
#include "records.hpp"

namespace dmx {

constexpr int latent_channels = 4;  // of SDXL; the filter below has a pixel's channels in registers

// The pictures of one batch, and the rows of the UNet's batch: [negative, positive] per picture, or [positive].
struct Batch {
    const std::int32_t* counter;  // the current step, the same for all pictures
    const StepRow* table;         // (pictures, most_steps)
    const Job* jobs;
    int most_steps, pictures, height, width, rows_per_picture;

    DMX_HD int plane() const { return height * width; }
    DMX_HD int size() const { return latent_channels * plane(); }  // of a picture; whole quads
    DMX_HD const StepRow& row(int picture, int step) const { return table[ptrdiff_t{picture} * most_steps + step]; }
    // A replay too many repeats the last row and does not read beyond the table.
    DMX_HD int step() const { return clamped(*counter, 0, most_steps - 1); }
};

// The items of all pictures are dealt to the workers in turn, so that small pictures keep all workers busy. Returns the
// first item of this worker in a picture that `before` items precede.
DMX_HD inline ptrdiff_t first_dealt(ptrdiff_t worker, ptrdiff_t workers, ptrdiff_t before) {
    const ptrdiff_t first = worker - before % workers;
    return first < 0 ? first + workers : first;
}

struct StepBefore {
    Batch batch;
    const float *x, *background, *mask;
    float* x_in;
    Reals network_in;  // (rows, channels, h, w)
    float *timestep, *time_ids;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int step = batch.step();
        const ptrdiff_t quads = batch.size() / 4;
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            const float scale = std::sqrt(row.sigma * row.sigma + 1.0F);
            for (ptrdiff_t quad = first_dealt(first_of(group), stride_of(group), n * quads); quad < quads;
                 quad += stride_of(group)) {
                blend(n, static_cast<int>(4 * quad), row, scale);
            }
            if (group.block == 0) tell(n, row, group.thread, group.threads);
        }
    }

  private:
    DMX_HD void blend(int n, int begin, const StepRow& row, float scale) const {
        const Quad noise = normals_of(batch.jobs[n].seed, Draw::blend, row.blend_step, begin / 4);
        for (int i = begin; i < begin + 4; ++i) {
            const ptrdiff_t at = ptrdiff_t{n} * batch.size() + i;
            const float share = mask[ptrdiff_t{n} * batch.plane() + i % batch.plane()];
            const float value = blended(x[at], background[at], share, noise.value[i - begin], row.sigma);
            x_in[at] = value;
            for (int r = 0; r < batch.rows_per_picture; ++r) {
                network_in.set((ptrdiff_t{n} * batch.rows_per_picture + r) * batch.size() + i, value / scale);
            }
        }
    }

    DMX_HD void tell(int n, const StepRow& row, int thread, int threads) const {
        for (int r = thread; r < batch.rows_per_picture; r += threads) {
            const ptrdiff_t at = ptrdiff_t{n} * batch.rows_per_picture + r;
            timestep[at] = row.timestep;
            for (int i = 0; i < 6; ++i) time_ids[6 * at + i] = row.time_ids[2 - batch.rows_per_picture + r][i];
        }
    }
};

// After the network: blur guidance, classifier-free guidance, rescaling, the solver, and blending of the background.
//
// Statistics of a picture need all blocks. Each block writes its sum to its own place, all wait, and every block adds
// up the sums in the same order, so results never depend on timing. At the end the counter is increased by one.
struct StepAfter {
    Batch batch;
    std::int32_t* counter;
    const float* x_in;
    Reals eps;  // (rows, channels, h, w)
    const float *background, *mask;
    float* x0;  // in: the previous prediction; out: this one
    float* x;
    double* scratch;
    std::int32_t *flags, bit;

    static constexpr int most_blocks = 512, threads = 128;
    static constexpr int tile_height = 8, tile_width = 16;
    static constexpr int halo_height = tile_height + 2 * bilateral_reach, halo_width = tile_width + 2 * bilateral_reach;

    struct alignas(16) Pixel {
        float channel[latent_channels];
    };
    struct Tile {
        Pixel guide[halo_height * halo_width], noise[halo_height * halo_width];
    };
    enum Sum { guide_mean, guide_squares, positive_mean, positive_squares, guided_mean, guided_squares, sums };

    static constexpr size_t shared_bytes() { return threads * sizeof(double) + sizeof(Tile); }
    static size_t scratch_bytes(int pictures, int height, int width) {
        const auto places = static_cast<size_t>(pictures);
        const auto size = static_cast<size_t>(latent_channels) * static_cast<size_t>(height) * static_cast<size_t>(width);
        return places * (sums * most_blocks * sizeof(double) + size * sizeof(float));
    }

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const int step = batch.step();
        bool blurs = false, rescales = false;
        for (int n = 0; n < batch.pictures; ++n) {
            blurs = blurs || batch.row(n, step).blur_alpha > 0.0F;
            rescales = rescales || is_rescaled(batch.row(n, step));
        }
        if (blurs) blur(group, step);
        if (rescales) measure_guided(group, step);
        finish(group, step);
        group.sync_all();  // no block reads the counter any more
        if (group.block == 0 && group.thread == 0) *counter += 1;
    }

  private:
    // e = x - (x - sigma eps), rounded where the host rounds.
    struct Level {
        float x0, e;
    };

    DMX_HD bool is_rescaled(const StepRow& row) const {
        return batch.rows_per_picture == 2 && row.guidance_rescale > 0.0F;
    }

    DMX_HD ptrdiff_t quads() const { return batch.size() / 4; }
    DMX_HD ptrdiff_t place(int n, ptrdiff_t i) const { return ptrdiff_t{n} * batch.size() + i; }
    DMX_HD float noise_of(int n, int row, ptrdiff_t i) const {
        return eps[(ptrdiff_t{n} * batch.rows_per_picture + row) * batch.size() + i];
    }

    DMX_HD Level scaled(int n, int row, ptrdiff_t i, float sigma) const {
        const float from = x_in[place(n, i)], to = from - sigma * noise_of(n, row, i);
        return {to, from - to};
    }

    DMX_HD Level scaled_positive(int n, ptrdiff_t i, float sigma) const {
        return scaled(n, batch.rows_per_picture - 1, i, sigma);
    }

    DMX_HD float* blurred() const {
        return reinterpret_cast<float*>(scratch + ptrdiff_t{sums} * batch.pictures * most_blocks);
    }

    DMX_HD float positive(int n, ptrdiff_t i, const StepRow& row) const {
        return row.blur_alpha > 0.0F ? blurred()[place(n, i)] : scaled_positive(n, i, row.sigma).e;
    }

    DMX_HD float guided_noise(int n, ptrdiff_t i, const StepRow& row, float e_positive) const {
        if (batch.rows_per_picture == 1) return e_positive;
        return guided(scaled(n, 0, i, row.sigma).e, e_positive, row.guidance_scale);
    }

    DMX_HD double* partial_sums(Sum sum, int n) const {
        return scratch + (ptrdiff_t{sum} * batch.pictures + n) * most_blocks;
    }

    template <class Group>
    DMX_HD static double* block_scratch(const Group& group) {
        return reinterpret_cast<double*>(group.shared);
    }

    // Writes this block's share of the sum of value(i) over picture n. All threads of the block must call this.
    template <class Group, class Value>
    DMX_HD void put_sum(Group& group, Sum sum, int n, const Value& value) const {
        const ptrdiff_t stride = stride_of(group);
        double mine = 0.0;
        for (ptrdiff_t i = first_dealt(first_of(group), stride, place(n, 0)); i < batch.size(); i += stride) mine += value(i);
        mine = block_sum(group, mine, block_scratch(group));
        if (group.thread == 0) partial_sums(sum, n)[group.block] = mine;
    }

    // The whole sum, after sync_all: bit for bit the same in every block.
    template <class Group>
    DMX_HD double get_sum(Group& group, Sum sum, int n) const {
        double mine = 0.0;
        for (int b = group.thread; b < group.blocks; b += group.threads) mine += partial_sums(sum, n)[b];
        return block_sum(group, mine, block_scratch(group));
    }

    template <class Group>
    DMX_HD double get_mean(Group& group, Sum sum, int n) const {
        return get_sum(group, sum, n) / batch.size();
    }

    template <class Group>
    DMX_HD Standard get_standard(Group& group, Sum mean, Sum squares, int n) const {
        const double centre = get_mean(group, mean, n);
        const double deviation = std::sqrt(get_sum(group, squares, n) / (batch.size() - 1));
        return {static_cast<float>(centre), static_cast<float>(deviation) + 1e-5F};
    }

    // Writes the blurred noise of the positive rows to `blurred()`. Ends with sync_all.
    template <class Group>
    DMX_HD void blur(Group& group, int step) const {
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            if (!(row.blur_alpha > 0.0F)) continue;
            put_sum(group, guide_mean, n, [&](ptrdiff_t i) -> double { return scaled_positive(n, i, row.sigma).x0; });
        }
        group.sync_all();
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            if (!(row.blur_alpha > 0.0F)) continue;
            const double mean = get_mean(group, guide_mean, n);
            put_sum(group, guide_squares, n, [&](ptrdiff_t i) -> double {
                const double off = scaled_positive(n, i, row.sigma).x0 - mean;
                return off * off;
            });
        }
        group.sync_all();
        const int across = (batch.width + tile_width - 1) / tile_width;
        const int tiles = across * ((batch.height + tile_height - 1) / tile_height);
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            if (!(row.blur_alpha > 0.0F)) continue;
            const Standard guide = get_standard(group, guide_mean, guide_squares, n);
            for (ptrdiff_t tile = first_dealt(group.block, group.blocks, ptrdiff_t{n} * tiles); tile < tiles;
                 tile += group.blocks) {
                const int top = static_cast<int>(tile) / across * tile_height, left = static_cast<int>(tile) % across * tile_width;
                load_tile(group, n, row.sigma, guide, top, left);
                group.sync();
                blur_tile(group, n, row.blur_alpha, top, left);
                group.sync();
            }
        }
        group.sync_all();
    }

    template <class Group>
    DMX_HD static Tile& tile_of(const Group& group) {
        return *reinterpret_cast<Tile*>(group.shared + threads * sizeof(double));
    }

    template <class Group>
    DMX_HD void load_tile(const Group& group, int n, float sigma, Standard standard, int top, int left) const {
        Tile& tile = tile_of(group);
        for (int k = group.thread; k < halo_height * halo_width; k += group.threads) {
            const int y = reflected(top + k / halo_width - bilateral_reach, batch.height);
            const int x = reflected(left + k % halo_width - bilateral_reach, batch.width);
            for (int c = 0; c < latent_channels; ++c) {
                const Level here = scaled_positive(n, ptrdiff_t{c} * batch.plane() + y * batch.width + x, sigma);
                tile.guide[k].channel[c] = (here.x0 - standard.mean) / standard.scale;
                tile.noise[k].channel[c] = here.e;
            }
        }
    }

    template <class Group>
    DMX_HD void blur_tile(const Group& group, int n, float alpha, int top, int left) const {
        const Tile& tile = tile_of(group);
        for (int k = group.thread; k < tile_height * tile_width; k += group.threads) {
            const int y = k / tile_width, x = k % tile_width;
            if (top + y >= batch.height || left + x >= batch.width) continue;
            const Pixel smooth = filtered(tile, y * halo_width + x);
            const Pixel& noise = tile.noise[(y + bilateral_reach) * halo_width + x + bilateral_reach];
            for (int c = 0; c < latent_channels; ++c) {
                const ptrdiff_t at = place(n, ptrdiff_t{c} * batch.plane() + (top + y) * batch.width + left + x);
                const float sharpened = x_in[at] - (alpha * smooth.channel[c] + (1.0F - alpha) * noise.channel[c]);
                blurred()[at] = x_in[at] - sharpened;
            }
        }
    }

    // The bilateral filter at one pixel; `corner` is the first pixel of its window. Sums in the host's order.
    DMX_HD static Pixel filtered(const Tile& tile, int corner) {
        const Pixel centre = tile.guide[corner + bilateral_reach * halo_width + bilateral_reach];
        Pixel sum{};
        float total = 0.0F;
        for (int dy = -bilateral_reach; dy <= bilateral_reach; ++dy) {
            for (int dx = -bilateral_reach; dx <= bilateral_reach; ++dx) {
                const int at = corner + (dy + bilateral_reach) * halo_width + dx + bilateral_reach;
                const Pixel guide = tile.guide[at], noise = tile.noise[at];
                float distance = 0.0F;
                for (int c = 0; c < latent_channels; ++c) distance += std::fabs(guide.channel[c] - centre.channel[c]);
                const float weight = bilateral_weight(distance, static_cast<float>(dy * dy + dx * dx));
                total += weight;
                for (int c = 0; c < latent_channels; ++c) sum.channel[c] += weight * noise.channel[c];
            }
        }
        for (int c = 0; c < latent_channels; ++c) sum.channel[c] = sum.channel[c] / total;
        return sum;
    }

    // Measures the spread of the positive and of the guided noise. Ends with sync_all.
    template <class Group>
    DMX_HD void measure_guided(Group& group, int step) const {
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            if (!is_rescaled(row)) continue;
            put_sum(group, positive_mean, n, [&](ptrdiff_t i) -> double { return positive(n, i, row); });
            put_sum(group, guided_mean, n,
                    [&](ptrdiff_t i) -> double { return guided_noise(n, i, row, positive(n, i, row)); });
        }
        group.sync_all();
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            if (!is_rescaled(row)) continue;
            const double mean = get_mean(group, positive_mean, n), centre = get_mean(group, guided_mean, n);
            put_sum(group, positive_squares, n, [&](ptrdiff_t i) -> double {
                const double off = positive(n, i, row) - mean;
                return off * off;
            });
            put_sum(group, guided_squares, n, [&](ptrdiff_t i) -> double {
                const double off = guided_noise(n, i, row, positive(n, i, row)) - centre;
                return off * off;
            });
        }
        group.sync_all();
    }

    // share, ratio: how the guided noise is rescaled, as by the host's `rescale`; share 0: not at all.
    struct Spread {
        float share, ratio;
    };

    template <class Group>
    DMX_HD Spread get_spread(Group& group, int n, const StepRow& row) const {
        if (!is_rescaled(row)) return {0.0F, 1.0F};
        const float wanted = get_standard(group, positive_mean, positive_squares, n).scale - 1e-5F;
        const float spread = get_standard(group, guided_mean, guided_squares, n).scale - 1e-5F;
        if (!(spread > 0.0F)) return {0.0F, 1.0F};
        return {row.guidance_rescale, wanted / spread};
    }

    template <class Group>
    DMX_HD void finish(Group& group, int step) const {
        for (int n = 0; n < batch.pictures; ++n) {
            const StepRow& row = batch.row(n, step);
            const Spread spread = get_spread(group, n, row);
            bool finite = true;
            for (ptrdiff_t quad = first_dealt(first_of(group), stride_of(group), n * quads()); quad < quads();
                 quad += stride_of(group)) {
                Quad noise{};
                if (row.solver_step >= 0) noise = normals_of(batch.jobs[n].seed, Draw::solver, row.solver_step, quad);
                for (int k = 0; k < 4; ++k) finite = solve(n, 4 * quad + k, row, spread, noise.value[k]) && finite;
            }
            if (!finite) group.set_bits(flags + n, bit);
        }
    }

    // The step of one number. Returns whether the network's output and the prediction are finite.
    DMX_HD bool solve(int n, ptrdiff_t i, const StepRow& row, Spread spread, float noise) const {
        const ptrdiff_t at = place(n, i);
        float e = guided_noise(n, i, row, positive(n, i, row));
        if (spread.share > 0.0F) e = spread.share * (e * spread.ratio) + (1.0F - spread.share) * e;
        const float from = x_in[at];
        float value = from - e;
        const float before = row.c_dx0 != 0.0F ? x0[at] : value;  // without history the memory may have any value
        float after = solved(from, value, before, noise, {row.c_x, row.c_x0, row.c_dx0, row.c_noise});
        if (batch.jobs[n].blends_output != 0) {
            const float change = (background[at] - value) * (1.0F - mask[ptrdiff_t{n} * batch.plane() + i % batch.plane()]);
            after += (row.c_x0 + row.c_dx0) * change;
            value += change;
        }
        x0[at] = value;
        x[at] = after;
        bool finite = is_finite(value) && is_finite(after);
        for (int r = 0; r < batch.rows_per_picture; ++r) finite = finite && is_finite(noise_of(n, r, i));
        return finite;
    }
};

}  // namespace dmx
