"""The Attribute Decoupling Mechanism (paper, section 3.3): a subject's attributes in words, and prompts made of them.

Whoever describes a subject has one method, `describe(pictures, class_name)`: a vision-language model behind an endpoint
(`endpoint`), a CLIP in a local folder (`clip`), or the embedded model's judge (`judge`).
"""

from dreammix_trt.trainer.attributes.describing import Describer, read_pictures
from dreammix_trt.trainer.attributes.prompts import CONTRAST, MOST_ATTRIBUTES, combine_prompts

__all__ = ["CONTRAST", "MOST_ATTRIBUTES", "Describer", "combine_prompts", "read_pictures"]
