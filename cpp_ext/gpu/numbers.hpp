// The number kernels as Python calls them. Each is enqueued in a stream, or runs immediately on the host.
#pragma once

#include "latents.hpp"
#include "launch.hpp"
#include "merge.hpp"
#include "steps.hpp"
#include "text.hpp"

namespace dmx {

void launch(const StepBefore& kernel, Place place);
void launch(const StepAfter& kernel, Place place);
void launch(const EncodeLatent& kernel, Place place);
void launch(const Noised& kernel, Place place);
void launch(const Scaled& kernel, Place place);
void launch(const Convert& kernel, Place place);
void launch(const CheckFinite& kernel, Place place);
void launch(const JoinText& kernel, Place place);
void launch(const WeighText& kernel, Place place);
void launch(const Tas& kernel, Place place);
void launch(const MergeWeights& kernel, Place place);

}  // namespace dmx
