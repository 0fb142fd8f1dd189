// The number kernels of dreammix_trt._cpp.gpu. Python has checked the arrays. Here we check that none is missing and
// that the counts make sense.
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <cstddef>
#include <map>
#include <string>

#include "bindings.hpp"
#include "gpu/numbers.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using dmx::at;
using dmx::place_of;
using dmx::require;
using dmx::Stream;
using Pointer = std::uintptr_t;

dmx::Reals reals(Pointer pointer, int half) {
    require(half == 0 || half == 1, "half must be 1 (float16) or 0 (float32)");
    require(pointer % (half != 0 ? 2 : 4) == 0, "an array is not aligned to its numbers");
    return {at<void>(pointer), half != 0};
}

void require_all(std::initializer_list<Pointer> pointers) {
    for (const Pointer pointer : pointers) require(pointer != 0, "an array is missing (0); only those said to may be");
}

void require_positive(std::initializer_list<std::int64_t> counts) {
    for (const std::int64_t count : counts) require(count > 0, "counts and sides must be positive");
}

void require_latent(int channels, int height, int width) {
    require(channels == dmx::latent_channels, "latents must have 4 channels");
    require_positive({height, width});
    require(std::int64_t{height} * width <= (1 << 28), "a latent is larger than 2^28 cells");
}

dmx::Batch batch_of(Pointer counter, Pointer table, Pointer jobs, int most_steps, int pictures, int channels, int height,
                    int width, int rows_per_picture) {
    require_all({counter, table, jobs});
    require_positive({most_steps, pictures});
    require_latent(channels, height, width);
    require(rows_per_picture == 1 || rows_per_picture == 2, "rows_per_picture must be 1 or 2");
    return {at<const std::int32_t>(counter), at<const dmx::StepRow>(table), at<const dmx::Job>(jobs), most_steps, pictures,
            height, width, rows_per_picture};
}

void step_before(Pointer counter, Pointer table, Pointer jobs, Pointer x, Pointer background, Pointer mask, Pointer x_in,
                 Pointer network_in, Pointer timestep, Pointer time_ids, int most_steps, int pictures, int channels,
                 int height, int width, int rows_per_picture, int half, Stream stream, int blocks, int threads) {
    require_all({x, background, mask, x_in, network_in, timestep, time_ids});
    dmx::launch(dmx::StepBefore{batch_of(counter, table, jobs, most_steps, pictures, channels, height, width, rows_per_picture),
                                at<const float>(x), at<const float>(background), at<const float>(mask), at<float>(x_in),
                                reals(network_in, half), at<float>(timestep), at<float>(time_ids)},
                place_of(stream, blocks, threads));
}

void step_after(Pointer counter, Pointer table, Pointer jobs, Pointer x_in, Pointer eps, Pointer background, Pointer mask,
                Pointer x0, Pointer x, Pointer scratch, Pointer flags, std::int32_t bit, int most_steps, int pictures,
                int channels, int height, int width, int rows_per_picture, int half, Stream stream, int blocks, int threads) {
    require_all({x_in, eps, background, mask, x0, x, scratch, flags});
    require(scratch % sizeof(double) == 0, "scratch must be aligned to 8 bytes");
    require(x_in != x && x_in != x0 && x != x0, "x_in, x and x0 must be different arrays");
    dmx::launch(dmx::StepAfter{batch_of(counter, table, jobs, most_steps, pictures, channels, height, width, rows_per_picture),
                               at<std::int32_t>(counter), at<const float>(x_in), reals(eps, half), at<const float>(background),
                               at<const float>(mask), at<float>(x0), at<float>(x), at<double>(scratch),
                               at<std::int32_t>(flags), bit},
                place_of(stream, blocks, threads));
}

size_t step_scratch(int pictures, int channels, int height, int width) {
    require_positive({pictures});
    require_latent(channels, height, width);
    return dmx::StepAfter::scratch_bytes(pictures, height, width);
}

void encode_latent(Pointer mean, Pointer std, Pointer job, Pointer latent, Pointer network, float scaling, int draw,
                   int channels, int height, int width, int half, Pointer flags, std::int32_t bit, Stream stream, int blocks,
                   int threads) {
    require_all({mean, std, job, latent, flags});
    require_positive({channels, height, width});
    require(draw >= 0, "draw must be a number of core.noise.DRAWS");
    dmx::launch(dmx::EncodeLatent{reals(mean, half), reals(std, half), at<const dmx::Job>(job), at<float>(latent),
                                  reals(network, half), scaling, static_cast<dmx::Draw>(draw),
                                  std::int64_t{channels} * height * width, at<std::int32_t>(flags), bit},
                place_of(stream, blocks, threads));
}

void noised(Pointer latent, Pointer job, int hand_over, Pointer out, std::int64_t count, Stream stream, int blocks, int threads) {
    require_all({latent, job, out});
    require_positive({count});
    dmx::launch(dmx::Noised{at<const float>(latent), at<const dmx::Job>(job), hand_over != 0, at<float>(out), count},
                place_of(stream, blocks, threads));
}

void scaled(Pointer latent, float factor, Pointer out, std::int64_t count, int half, Stream stream, int blocks, int threads) {
    require_all({latent, out});
    require_positive({count});
    require(factor != 0.0F, "factor must not be 0");
    dmx::launch(dmx::Scaled{at<const float>(latent), factor, reals(out, half), count}, place_of(stream, blocks, threads));
}

void convert(Pointer source, int source_half, Pointer out, int out_half, std::int64_t count, Stream stream, int blocks,
             int threads) {
    require_all({source, out});
    require_positive({count});
    require(source != out || source_half == out_half, "source and out overlap");
    dmx::launch(dmx::Convert{reals(source, source_half), reals(out, out_half), count}, place_of(stream, blocks, threads));
}

void check_finite(Pointer values, std::int64_t count, int half, Pointer flags, std::int32_t bit, Stream stream, int blocks,
                  int threads) {
    require_all({values, flags});
    require_positive({count});
    dmx::launch(dmx::CheckFinite{reals(values, half), count, at<std::int32_t>(flags), bit}, place_of(stream, blocks, threads));
}

void join_text(Pointer first, Pointer second, Pointer out, int rows, int first_width, int second_width, int half, Pointer flags,
               std::int32_t first_bit, std::int32_t second_bit, Stream stream, int blocks, int threads) {
    require_all({first, second, out, flags});
    require_positive({rows, first_width, second_width});
    dmx::launch(dmx::JoinText{reals(first, half), reals(second, half), at<float>(out), rows, first_width, second_width,
                              at<std::int32_t>(flags), first_bit, second_bit},
                place_of(stream, blocks, threads));
}

void weigh_text(Pointer tokens, Pointer empty, Pointer weights, int rows, int first_width, int width, Stream stream, int blocks,
                int threads) {
    require_all({tokens, empty, weights});
    require_positive({rows, width});
    require(first_width >= 0 && first_width <= width, "first_width must be in 0 .. width");
    require(tokens != empty, "tokens and empty must be different arrays");
    dmx::launch(dmx::WeighText{at<float>(tokens), at<const float>(empty), at<const float>(weights), rows, first_width, width},
                place_of(stream, blocks, threads));
}

void tas(Pointer tokens, Pointer removed, Pointer plan, int rows, int width, Stream stream, int blocks, int threads) {
    require_all({tokens, removed, plan});
    require_positive({rows, width});
    require(tokens != removed, "tokens and removed must be different arrays");
    dmx::launch(dmx::Tas{at<float>(tokens), at<const float>(removed), at<const std::int32_t>(plan), rows, width},
                place_of(stream, blocks, threads));
}

// Checks the records of a table in host memory, whose arrays are on the device, and numbers their tasks. Returns how many
// there are.
std::int64_t plan_merges(Pointer table, int count) {
    require_all({table});
    require_positive({count});
    std::int64_t tasks = 0;
    for (dmx::Merge* slot = at<dmx::Merge>(table); slot != at<dmx::Merge>(table) + count; ++slot) {
        require(slot->source != nullptr && slot->target != nullptr, "an array is missing (0); only those said to may be");
        require(slot->rank >= 0 && (slot->rank == 0 || (slot->left != nullptr && slot->right != nullptr)),
                "a slot of a rank above 0 has no factors");
        require(slot->kind >= dmx::Merge::floats && slot->kind <= dmx::Merge::eighths, "kind must be 0, 1 or 2");
        require_positive({slot->rows, slot->columns});
        require(slot->stride >= slot->columns, "stride must be at least columns");
        slot->first = static_cast<std::int32_t>(tasks);
        tasks += dmx::MergeWeights::tasks_of(*slot);
    }
    require(tasks <= (1 << 30), "a table has more than 2^30 tasks");
    return tasks;
}

void merge_weights(Pointer slots, int count, std::int64_t tasks, Stream stream, int blocks, int threads) {
    require_all({slots});
    require_positive({count, tasks});
    dmx::launch(dmx::MergeWeights{at<const dmx::Merge>(slots), count, tasks}, place_of(stream, blocks, threads));
}

using Layout = std::pair<size_t, std::map<std::string, size_t>>;

#define DMX_FIELD(record, field) {#field, offsetof(dmx::record, field)}

// The layouts that engine/device/records.py repeats, without unused fields.
std::map<std::string, std::uint32_t> draws() {
    const auto number = [](dmx::Draw draw) { return static_cast<std::uint32_t>(draw); };
    return {
        {"init_noise", number(dmx::Draw::init)}, {"blend_noise", number(dmx::Draw::blend)},
        {"solver_noise", number(dmx::Draw::solver)}, {"renoise_switch", number(dmx::Draw::renoise)},
    };
}

std::map<std::string, Layout> layouts() {
    return {
        {"CUT", {sizeof(dmx::Cut), {DMX_FIELD(Cut, height), DMX_FIELD(Cut, width), DMX_FIELD(Cut, row0), DMX_FIELD(Cut, row1),
                                    DMX_FIELD(Cut, col0), DMX_FIELD(Cut, col1), DMX_FIELD(Cut, out_height),
                                    DMX_FIELD(Cut, out_width), DMX_FIELD(Cut, vertically_first), DMX_FIELD(Cut, rows_at),
                                    DMX_FIELD(Cut, rows_most), DMX_FIELD(Cut, cols_at), DMX_FIELD(Cut, cols_most)}}},
        {"SHEET", {sizeof(dmx::Sheet), {DMX_FIELD(Sheet, height), DMX_FIELD(Sheet, width), DMX_FIELD(Sheet, row0),
                                        DMX_FIELD(Sheet, row1), DMX_FIELD(Sheet, col0), DMX_FIELD(Sheet, col1),
                                        DMX_FIELD(Sheet, soft), DMX_FIELD(Sheet, keeps_local), DMX_FIELD(Sheet, local_row0),
                                        DMX_FIELD(Sheet, local_row1), DMX_FIELD(Sheet, local_col0),
                                        DMX_FIELD(Sheet, local_col1)}}},
        {"FIELD", {sizeof(dmx::Field), {DMX_FIELD(Field, height), DMX_FIELD(Field, width), DMX_FIELD(Field, reach),
                                        DMX_FIELD(Field, row0), DMX_FIELD(Field, row1), DMX_FIELD(Field, col0),
                                        DMX_FIELD(Field, col1)}}},
        {"JOB", {sizeof(dmx::Job), {DMX_FIELD(Job, seed), DMX_FIELD(Job, start_scale), DMX_FIELD(Job, hand_over_sigma),
                                    DMX_FIELD(Job, samples_vae), DMX_FIELD(Job, blends_output)}}},
        {"STEP", {sizeof(dmx::StepRow), {DMX_FIELD(StepRow, sigma), DMX_FIELD(StepRow, timestep),
                                         DMX_FIELD(StepRow, guidance_scale), DMX_FIELD(StepRow, guidance_rescale),
                                         DMX_FIELD(StepRow, blur_alpha), DMX_FIELD(StepRow, c_x), DMX_FIELD(StepRow, c_x0),
                                         DMX_FIELD(StepRow, c_dx0), DMX_FIELD(StepRow, c_noise), DMX_FIELD(StepRow, time_ids),
                                         DMX_FIELD(StepRow, blend_step),
                                         DMX_FIELD(StepRow, solver_step)}}},
        {"MERGE", {sizeof(dmx::Merge), {DMX_FIELD(Merge, source), DMX_FIELD(Merge, target), DMX_FIELD(Merge, left),
                                        DMX_FIELD(Merge, right), DMX_FIELD(Merge, stride), DMX_FIELD(Merge, rows),
                                        DMX_FIELD(Merge, columns), DMX_FIELD(Merge, rank), DMX_FIELD(Merge, kind),
                                        DMX_FIELD(Merge, first), DMX_FIELD(Merge, left_scale),
                                        DMX_FIELD(Merge, right_scale), DMX_FIELD(Merge, out_scale)}}},
    };
}

#undef DMX_FIELD

// Defines a kernel: the names of its own arguments, then where it runs.
template <typename Function, typename... Arguments>
void define(nb::module_& gpu, const char* name, Function function, const Arguments&... arguments) {
    gpu.def(name, function, nb::kw_only(), arguments..., "stream"_a = nb::none(), "blocks"_a = 1, "threads"_a = 1,
            nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

namespace dmx {

void bind_numbers(nb::module_& gpu) {
    define(gpu, "step_before", &step_before, "counter"_a, "table"_a, "jobs"_a, "x"_a, "background"_a, "mask"_a, "x_in"_a,
           "network_in"_a, "timestep"_a, "time_ids"_a, "most_steps"_a, "pictures"_a, "channels"_a, "height"_a, "width"_a,
           "rows_per_picture"_a, "half"_a);
    define(gpu, "step_after", &step_after, "counter"_a, "table"_a, "jobs"_a, "x_in"_a, "eps"_a, "background"_a, "mask"_a,
           "x0"_a, "x"_a, "scratch"_a, "flags"_a, "bit"_a, "most_steps"_a, "pictures"_a, "channels"_a, "height"_a, "width"_a,
           "rows_per_picture"_a, "half"_a);
    gpu.def("step_scratch", &step_scratch, "pictures"_a, "channels"_a, "height"_a, "width"_a);
    define(gpu, "encode_latent", &encode_latent, "mean"_a, "std"_a, "job"_a, "latent"_a, "network"_a, "scaling"_a, "draw"_a,
           "channels"_a, "height"_a, "width"_a, "half"_a, "flags"_a, "bit"_a);
    define(gpu, "noised", &noised, "latent"_a, "job"_a, "hand_over"_a, "out"_a, "count"_a);
    define(gpu, "scaled", &scaled, "latent"_a, "factor"_a, "out"_a, "count"_a, "half"_a);
    define(gpu, "convert", &convert, "source"_a, "source_half"_a, "out"_a, "out_half"_a, "count"_a);
    define(gpu, "check_finite", &check_finite, "values"_a, "count"_a, "half"_a, "flags"_a, "bit"_a);
    define(gpu, "join_text", &join_text, "first"_a, "second"_a, "out"_a, "rows"_a, "first_width"_a, "second_width"_a, "half"_a,
           "flags"_a, "first_bit"_a, "second_bit"_a);
    define(gpu, "weigh_text", &weigh_text, "tokens"_a, "empty"_a, "weights"_a, "rows"_a, "first_width"_a, "width"_a);
    define(gpu, "tas", &tas, "tokens"_a, "removed"_a, "plan"_a, "rows"_a, "width"_a);
    define(gpu, "merge_weights", &merge_weights, "slots"_a, "count"_a, "tasks"_a);
    gpu.def("plan_merges", &plan_merges, "table"_a, "count"_a);
    gpu.def("draws", &draws, "Draw of core.noise.DRAWS -> its number here.");
    gpu.def("layouts", &layouts, "Record of engine/device/records.py -> (bytes, {field: offset}).");
}

}  // namespace dmx
