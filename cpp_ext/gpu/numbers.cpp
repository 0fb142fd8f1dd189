#include "numbers.hpp"

namespace dmx {

namespace {

ptrdiff_t quads_of(const Batch& batch) { return ptrdiff_t{batch.pictures} * batch.size() / 4; }

}  // namespace

void launch(const StepBefore& kernel, Place place) { run(kernel, grid_for(quads_of(kernel.batch), 128), place); }

void launch(const StepAfter& kernel, Place place) {
    Grid grid = grid_for(quads_of(kernel.batch), StepAfter::threads);
    grid.blocks = std::min(grid.blocks, StepAfter::most_blocks);
    grid.shared = StepAfter::shared_bytes();
    grid.together = true;
    run(kernel, grid, place);
}

void launch(const EncodeLatent& kernel, Place place) { run(kernel, grid_for(quads_of(kernel.count), 128), place); }

void launch(const Noised& kernel, Place place) { run(kernel, grid_for(quads_of(kernel.count), 128), place); }

void launch(const Scaled& kernel, Place place) { run(kernel, grid_for(kernel.count), place); }

void launch(const Convert& kernel, Place place) { run(kernel, grid_for(kernel.count), place); }

void launch(const CheckFinite& kernel, Place place) { run(kernel, grid_for(kernel.count), place); }

void launch(const JoinText& kernel, Place place) {
    run(kernel, grid_for(ptrdiff_t{kernel.rows} * (kernel.first_width + kernel.second_width)), place);
}

void launch(const WeighText& kernel, Place place) {
    run(kernel, grid_for(ptrdiff_t{kernel.rows} * kernel.width), place);
}

void launch(const Tas& kernel, Place place) {
    constexpr int threads = 256;
    run(kernel, {std::max(kernel.rows, 1), threads, threads * sizeof(double)}, place);
}

void launch(const MergeWeights& kernel, Place place) {
    run(kernel, grid_for(kernel.tasks * MergeWeights::task_tiles, MergeWeights::task_tiles), place);
}

}  // namespace dmx
