"""Methods: named compositions, each an Optax transformation."""

from curvax.methods.direct import ggn_direct as ggn_direct
from curvax.methods.direct import newton_direct as newton_direct
from curvax.methods.egn import egn as egn
from curvax.methods.ekfac import ekfac as ekfac
from curvax.methods.ggn_cg import ggn_cg as ggn_cg
from curvax.methods.kfac import kfac as kfac
from curvax.methods.newton_cg import newton_cg as newton_cg
from curvax.methods.newton_muon import newton_muon as newton_muon
