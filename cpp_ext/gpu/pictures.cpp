// Launches the picture kernels. When the sizes are in a record, the grid fills the device whatever they are.
#include "pictures.hpp"

#include <algorithm>

#include "cut.hpp"
#include "fill.hpp"
#include "masks.hpp"
#include "paste.hpp"
#include "tiles.hpp"

namespace dmx::gpu {

void cut(const CutArgs& args, Place place) {
    if (args.channels == 3) return run(CutKernel<3>{args}, {0, block_threads, CutKernel<3>::shared}, place);
    run(CutKernel<1>{args}, {0, block_threads, CutKernel<1>::shared}, place);
}

void keep_speck(const SpeckArgs& args, Place place) { run(Speck{args}, {}, place); }

void normalise(const NormaliseArgs& args, Place place) { run(Normalise{args}, {}, place); }

std::size_t fill_scratch(int height, int width) {
    return std::max(FillPlan::bytes_for(height, width), FillPlan::most_bytes(height, width));
}

void fill(const FillArgs& args, const std::vector<Blur>& cascade, Place place) {
    const FillPlan plan = FillPlan::of(args);
    run(FindRows{plan}, {args.height, block_threads, FindRows::shared}, place);
    run(FindBox{plan}, {1, block_threads, FindBox::shared}, place);
    for (const Blur& blur : cascade) {
        const BoxWeights weights = box_weights(blur.radius);
        const int strip = BlurColumns::strip_for(blur.radius);
        const int column_blocks = parts_of(plan.words * parts_of(args.height, strip), BlurColumns::threads);
        for (int repeat = 0; repeat < blur.repeats; ++repeat) {
            run(BlurRows{plan, blur.radius, repeat == 0, BlurRows::grain_bits_for(args.width), weights},
                {args.height, block_threads, BlurRows::shared_for(args.width)}, place);
            run(BlurColumns{plan, blur.radius, strip, weights}, {column_blocks, BlurColumns::threads}, place);
        }
    }
}

void latent_mask(const LatentMaskArgs& args, Place place) { run(LatentMask{args}, {}, place); }

std::size_t distance_scratch(std::int64_t most_pixels) {
    return static_cast<std::size_t>(most_pixels) * sizeof(std::uint16_t);
}

void feather(const FeatherArgs& args, Place place) {
    run(DistancesInRows{args.mask, args.field, args.scratch, 0, nullptr},
        {0, block_threads, DistancesInRows::shared}, place);
    run(Feather{args}, {}, place);
}

void seam(const SeamArgs& args, Place place) {
    run(DistancesInRows{args.mask, args.field, args.scratch, 1, args.deepest},
        {0, block_threads, DistancesInRows::shared}, place);
    run(SeamRim{args}, {0, block_threads, SeamRim::shared}, place);
    run(SeamLevels{args}, {}, place);
}

void paste(const PasteArgs& args, Place place) { run(Paste{args}, {}, place); }

void decoded(const DecodedArgs& args, Place place) { run(Decoded{args}, {}, place); }

void take_tile(const TakeTileArgs& args, Place place) { run(TakeTile{args}, {}, place); }

void add_tile(const AddTileArgs& args, Place place) { run(AddTile{args}, {}, place); }

}  // namespace dmx::gpu
