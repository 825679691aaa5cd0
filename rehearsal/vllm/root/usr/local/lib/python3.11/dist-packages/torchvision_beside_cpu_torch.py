"""Let PyPI's torchvision, which is linked against CUDA, be imported beside a CPU build of torch.

Its compiled operators cannot load there. Only their declarations are missed at import, so they are declared just
before the first import of torchvision; a .pth file loads this module in every process.
"""

import sys


class _DeclareOperatorsFirst:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            # The declarations last as long as this object.
            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            sys.modules[__name__].declarations = self.library
        return None


sys.meta_path.insert(0, _DeclareOperatorsFirst())
