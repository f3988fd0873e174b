"""Statistics of the backward pass, for any model: where parameters are used, and taps there."""

from curvax.taps.sites import Site as Site
from curvax.taps.sites import Sites as Sites
from curvax.taps.sites import sites as sites
