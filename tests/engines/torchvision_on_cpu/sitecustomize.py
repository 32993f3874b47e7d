"""On PYTHONPATH: lets PyPI's torchvision, built for CUDA, be imported beside a CPU build of torch.

Its compiled operations do not load there, and importing it fails because two of them are described without being
declared. Nothing that is used calls them.
"""

import sys
from importlib.abc import MetaPathFinder

LIBRARY = []


class Declares(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            LIBRARY.append(torch.library.Library("torchvision", "DEF"))
            for operation in ("nms", "qnms"):
                LIBRARY[0].define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declares())
