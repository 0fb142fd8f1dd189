// Pastes a stage's content into the picture, one thread per pixel. The arithmetic is that of the host (../paste.hpp):
// every mix is truncated to 8 bit.
#pragma once

#include <cmath>

#include "../paste.hpp"
#include "block.hpp"
#include "pictures.hpp"

namespace dmx::gpu {

struct Paste {
    PasteArgs args;

    template <class Group>
    DMX_HD void operator()(Group& group) const {
        const Sheet sheet = *args.sheet;
        for_pixels(group, sheet.height, sheet.width, [&](int y, int x) {
            const ptrdiff_t pixel = ptrdiff_t{y} * sheet.width + x;
            const std::uint8_t* original = args.original + 3 * pixel;
            const std::uint8_t weight = args.weight[pixel];
            Colour colour = colour_of(original);
            if (weight != 0) {  // with weight 0 the result is exactly the original
                const Colour top = sheet.keeps_local != 0 ? joined(sheet, y, x, colour) : placed(sheet, y, x, colour);
                colour = mix(top, colour, share_of(weight));
            }
            for (int c = 0; c < 3; ++c) args.out[3 * pixel + c] = colour.of[c];
        });
    }

  private:
    struct Colour {
        std::uint8_t of[3];
    };

    DMX_HD static Colour colour_of(const std::uint8_t* at) { return {{at[0], at[1], at[2]}}; }

    DMX_HD static float share_of(std::uint8_t weight) { return static_cast<float>(weight) / 255.0F; }

    DMX_HD static Colour mix(const Colour& top, const Colour& bottom, float share) {
        Colour out{};
        for (int c = 0; c < 3; ++c) out.of[c] = mixed(top.of[c], bottom.of[c], share);
        return out;
    }

    // The content inside its box, softened if the sheet says so.
    DMX_HD Colour placed(const Sheet& sheet, int y, int x, const Colour& original) const {
        const Box box{sheet.row0, sheet.row1, sheet.col0, sheet.col1};
        const Colour content = within(args.content, box, y, x, original);
        if (sheet.soft == 0 || !inside(box, y, x)) return content;
        const int height = box.row1 - box.row0, width = box.col1 - box.col0;
        return mix(content, original, soft_share(y - box.row0, x - box.col0, height, width));
    }

    // Local content, mixed with the global content by the seam.
    DMX_HD Colour joined(const Sheet& sheet, int y, int x, const Colour& original) const {
        const Box local{sheet.local_row0, sheet.local_row1, sheet.local_col0, sheet.local_col1};
        const Colour top = within(args.content, {sheet.row0, sheet.row1, sheet.col0, sheet.col1}, y, x, original);
        const Colour bottom = within(args.local, local, y, x, original);
        return mix(top, bottom, share_of(args.seam[ptrdiff_t{y} * sheet.width + x]));
    }

    DMX_HD static bool inside(const Box& box, int y, int x) {
        return y >= box.row0 && y < box.row1 && x >= box.col0 && x < box.col1;
    }

    DMX_HD static Colour within(const std::uint8_t* content, const Box& box, int y, int x, const Colour& otherwise) {
        if (!inside(box, y, x)) return otherwise;
        return colour_of(content + 3 * (ptrdiff_t{y - box.row0} * (box.col1 - box.col0) + x - box.col0));
    }
};

}  // namespace dmx::gpu
