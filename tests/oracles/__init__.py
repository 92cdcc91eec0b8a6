"""Oracles: what recipes.md says, row by row and token by token, in fp64.

They are plain loops and share no code with the compiler. The weights are the model's own parameters, so that autograd
through the loops gives the gradients. A model is a `LayerMath`: how one token goes through one layer, given the tokens
that it may see.

What all oracles share is here by name; each recipe that changes the loop is a module of its own, such as
`expert`, `staggered`, `widened`, `strided`.
"""

from .attention import Key as Key
from .attention import Visible as Visible
from .attention import attend as attend
from .crossing import CrossMath as CrossMath
from .kinds import ENCODERS as ENCODERS
from .kinds import KINDS as KINDS
from .kinds import QK_NORM as QK_NORM
from .kinds import SHARED as SHARED
from .kinds import build as build
from .kinds import inputs_of as inputs_of
from .kinds import math_of as math_of
from .kinds import token_input as token_input
from .rows import LayerMath as LayerMath
from .rows import rows_of as rows_of
from .sizes import VOCAB as VOCAB
from .sizes import WIDTH as WIDTH
from .sizes import WINDOW as WINDOW
from .tying import Tied as Tied
from .tying import looped as looped
from .tying import slot_of as slot_of
from .tying import sources_of as sources_of
from .tying import tie as tie
from .tying import unrouted as unrouted
from .wide import Wide as Wide
