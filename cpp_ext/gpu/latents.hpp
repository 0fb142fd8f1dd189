// Latents between networks and sampling: posteriors, start and hand-over noise, type conversions, the finiteness check.
// engine/host/painter.py has the same arithmetic for the host.
#pragma once

#include "../philox.hpp"
#include "group.hpp"
#include "records.hpp"

namespace dmx {

// Elements 4 quad .. 4 quad + 3 of a draw. Philox makes them together, so a thread takes four neighbours.
struct Quad {
    float value[4];
};

DMX_HD inline Quad normals_of(std::uint64_t seed, Draw draw, std::int32_t step, ptrdiff_t quad) {
    Quad out;
    normal_block(seed, static_cast<std::uint32_t>(draw), static_cast<std::uint32_t>(step), static_cast<std::uint64_t>(quad),
                 out.value);
    return out;
}

DMX_HD inline ptrdiff_t quads_of(ptrdiff_t count) { return (count + 3) / 4; }

// The pieces of work that each thread does: first, first + stride, ...
template <class Group>
DMX_HD ptrdiff_t first_of(const Group& group) {
    return ptrdiff_t{group.block} * group.threads + group.thread;
}

template <class Group>
DMX_HD ptrdiff_t stride_of(const Group& group) {
    return ptrdiff_t{group.blocks} * group.threads;
}

// latent = scaling * mean, or * a sample of the posterior if the job asks for one. `network` gets the same; may be
// null.
struct EncodeLatent {
    Reals mean, std;
    const Job* job;
    float* latent;
    Reals network;
    float scaling;
    Draw draw;
    ptrdiff_t count;
    std::int32_t *flags, bit;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const bool samples = job->samples_vae != 0;
        bool finite = true;
        for (ptrdiff_t quad = first_of(group); quad < quads_of(count); quad += stride_of(group)) {
            Quad noise{};
            if (samples) noise = normals_of(job->seed, draw, 0, quad);
            for (int k = 0; k < 4 && 4 * quad + k < count; ++k) {
                const ptrdiff_t i = 4 * quad + k;
                float value = mean[i];
                finite = finite && is_finite(value);
                if (samples) value = value + std[i] * noise.value[k];
                value = scaling * value;
                finite = finite && is_finite(value);
                latent[i] = value;
                if (network.at != nullptr) network.set(i, value);
            }
        }
        if (!finite) group.set_bits(flags, bit);
    }
};

// The latent that a stage starts from. `out` may be `latent`.
struct Noised {
    const float* latent;
    const Job* job;
    bool hand_over;  // noise of the level at the hand-over, else the first noise
    float* out;
    ptrdiff_t count;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const float scale = hand_over ? job->hand_over_sigma : job->start_scale;
        const Draw draw = hand_over ? Draw::renoise : Draw::init;
        for (ptrdiff_t quad = first_of(group); quad < quads_of(count); quad += stride_of(group)) {
            const Quad noise = normals_of(job->seed, draw, 0, quad);
            for (int k = 0; k < 4 && 4 * quad + k < count; ++k) {
                out[4 * quad + k] = latent[4 * quad + k] + scale * noise.value[k];
            }
        }
    }
};

struct Scaled {
    const float* latent;
    float factor;
    Reals out;
    ptrdiff_t count;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (ptrdiff_t i = first_of(group); i < count; i += stride_of(group)) out.set(i, latent[i] / factor);
    }
};

struct Convert {
    Reals source, out;
    ptrdiff_t count;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        for (ptrdiff_t i = first_of(group); i < count; i += stride_of(group)) out.set(i, source[i]);
    }
};

struct CheckFinite {
    Reals values;
    ptrdiff_t count;
    std::int32_t *flags, bit;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        bool finite = true;
        for (ptrdiff_t i = first_of(group); i < count; i += stride_of(group)) finite = finite && is_finite(values[i]);
        if (!finite) group.set_bits(flags, bit);
    }
};

}  // namespace dmx
