"""M-FAC: inverse-vector products with the Fisher matrix of a window of gradients.

F̂ = (1/n) GᵀG for the n gradients in the window, the rows of G, and F̂ + λI is what is inverted
(Frantar, Kurtic & Alistarh 2021, "M-FAC: Efficient Matrix-Free Approximations of Second-Order
Information", arXiv 2107.03356).
"""

from hesscli.engines.mfac.gram import Gram
from hesscli.engines.mfac.sharded import ShardedWindow
from hesscli.engines.mfac.static import StaticFisher
from hesscli.engines.mfac.window import GradientWindow
from hesscli.engines.mfac.windowed import WindowedFisher

__all__ = ["GradientWindow", "Gram", "ShardedWindow", "StaticFisher", "WindowedFisher"]
