"""Conjugate gradients at network scale, on parameter pytrees.

Notation: A x = b is solved by minimising the model φ(x) = ½ xᵀA x − bᵀx; r = b − A x is the
residual, M ≈ A⁻¹ the preconditioner, p the search direction, γ = rᵀM r, Δ the trust radius.

Sources: Hestenes & Stiefel (1952) for the recursion; Nocedal & Wright, "Numerical Optimization"
(2006), Algorithms 5.3 and 7.1 (preconditioning, negative curvature); Steihaug (1983), "The
conjugate gradient method and trust regions in large scale optimization", Algorithm 2.1; Martens
(2010), "Deep learning via Hessian-free optimization", §4.4 (stop on model decrease).
"""

import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Int, PyTree, Scalar, ScalarLike

from curvax import _tree as tree

# An unrolled loop is compiled once per step: past this length compile time outweighs the gain.
_MAX_AUTO_UNROLL = 32
# No stop reason yet.
_RUNNING = -1


class StopReason(enum.IntEnum):
    """Why `CG` stopped, as in `stats["stop"]`."""

    converged = 0
    """‖r‖ ≤ atol + rtol·‖b‖."""
    max_steps = 1
    """The step limit was reached."""
    relative_decrease = 2
    """The model's relative decrease per step fell below `relative_decrease`."""
    negative_curvature = 3
    """A direction with pᵀA p ≤ 0 was met; with a radius it was followed to the boundary."""
    boundary = 4
    """The trust-region boundary was reached along a direction of positive curvature."""
    nonfinite = 5
    """The vector, the operator or the preconditioner gave a NaN or an infinity."""
    indefinite_preconditioner = 6
    """rᵀM r ≤ 0 at a nonzero residual: the preconditioner is not positive definite."""


class _State(eqx.Module):
    # A, or −A where the user's operator is negative semidefinite.
    operator: lx.AbstractLinearOperator
    negated: bool = eqx.field(static=True)


class _Carry(NamedTuple):
    x: PyTree[Array]
    r: PyTree[Array]
    p: PyTree[Array]
    gamma: Scalar  # rᵀM r at the residual that made p
    rr: Scalar  # rᵀr
    phi: Scalar  # φ(x)
    step: Int[Array, ""]  # updates made to x
    trip: Int[Array, ""]  # products with A: steps, and recomputed residuals
    status: Int[Array, ""]
    history: Array | None  # φ after each step, for the stop on model decrease


class CG(lx.AbstractLinearSolver[_State]):
    """Conjugate gradients for symmetric operators over pytrees, at the scale of a network.

    A replacement for `lx.CG`, which returns NaN in float32 from about 1e5 parameters on. Use it
    with `lx.linear_solve(operator, b, CG(...))`; inside training steps prefer
    `solver.compute(solver.init(operator, {}), b, options)`, which keeps shardings and traces the
    matrix-vector product once. Vectors are never ravelled. They are held in float32 or the leaf's
    dtype if wider, are cast to the operator's dtypes for each product, and the solution is
    returned in the dtypes of `operator.in_structure()`.

    The operator must be tagged symmetric. It need not be positive definite: a direction of
    negative curvature stops the iteration and is reported. For an operator tagged negative
    semidefinite −A is solved for (and the preconditioner must approximate (−A)⁻¹).

    **Options** (the `options` of `lx.linear_solve` or `compute`):

    - `preconditioner`: a positive semidefinite `lx.AbstractLinearOperator` approximating A⁻¹.
    - `y0`: warm start, shaped as `b`; costs one more product. Ignored where it is not finite.
    - `radius`: trust radius Δ on ‖x‖ (Euclidean). On leaving the ball, and on negative curvature,
        x goes to the boundary along p (Steihaug 1983, eq. 2.3). A `y0` outside is scaled back to
        the boundary. An infinite radius is no radius.

    **Result:** `successful` on convergence, on the stop on model decrease, and with a radius on
    its boundary; `max_steps_reached` at the step limit (but `successful` when
    `rtol == atol == 0`, which asks for just that many steps); `nonfinite_input` for a `b` that is
    not finite; `breakdown` for other non-finite values, an indefinite preconditioner, and negative
    curvature without a radius. The last finite iterate is returned in every case. Negative
    curvature on the first step from zero without a radius returns p = M b itself (Nocedal &
    Wright, Algorithm 7.1): a descent direction, though without a length of its own.

    **Stats**, all scalar arrays: `num_steps`, `max_steps` (int32), `stop` (int32, a
    [`StopReason`][]), and in the accumulation dtype `residual_norm` ‖r‖/‖b‖, `quadratic` φ(x),
    `curvature` xᵀA x, at the solution (NaN where no finite residual was ever seen).

    Gradients through `lx.linear_solve` are those of A⁻¹b, so they assume convergence; with a
    `radius` the solution is no linear function of `b` and reverse mode raises a `ValueError`.
    """

    rtol: ScalarLike = 1e-5
    """Relative tolerance: stop at ‖r‖ ≤ atol + rtol·‖b‖."""
    atol: ScalarLike = 0.0
    """Absolute tolerance."""
    max_steps: int | None = eqx.field(default=None, static=True)
    """Step limit; None is min(10·n, 1000)."""
    relative_decrease: ScalarLike | None = None
    """ε of Martens (2010, §4.4); 5e-4 is his choice. None for no such stop."""
    residual_every: int | None = eqx.field(default=None, static=True)
    """Recompute r = b − A x after every so many steps, one more product each; None for never."""
    unroll: bool | None = eqx.field(default=None, static=True)
    """Whether to run `max_steps` masked iterations as straight-line code in place of a while loop.

    XLA's CPU backend takes a far slower path for convolutions inside loops. None unrolls when the
    backend is the CPU, `max_steps` is at most 32 and the product with A contains a convolution."""

    def __check_init__(self):
        for name in ("rtol", "atol", "relative_decrease"):
            value = getattr(self, name)
            if isinstance(value, (int, float)) and value < 0:
                raise ValueError(f"CG: {name} must be non-negative, got {value}.")
        for name in ("max_steps", "residual_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"CG: {name} must be at least 1 or None, got {value}.")
        if self.unroll and self.max_steps is None:
            raise ValueError("CG: unroll=True needs max_steps.")

    def init(self, operator: lx.AbstractLinearOperator, options: dict[str, Any]) -> _State:
        """Check and linearise the operator. Raises `ValueError` unless square and symmetric."""
        del options
        in_structure, out_structure = operator.in_structure(), operator.out_structure()
        if _shapes(in_structure) != _shapes(out_structure):
            raise ValueError(
                "CG needs a square operator; got one with in_structure "
                f"{in_structure} and out_structure {out_structure}."
            )
        if any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jax.tree.leaves(in_structure)):
            raise ValueError(f"CG is for real operators; got in_structure {in_structure}.")
        if not lx.is_symmetric(operator):
            raise ValueError(
                "CG needs a symmetric operator; tag it with `lx.symmetric_tag` or "
                f"`lx.positive_semidefinite_tag`. Got a {type(operator).__name__} with "
                f"in_structure {in_structure}."
            )
        negated = lx.is_negative_semidefinite(operator) and not lx.is_positive_semidefinite(
            operator
        )
        return _State(lx.linearise(-operator if negated else operator), negated)

    def compute(
        self, state: _State, vector: PyTree[Array], options: dict[str, Any]
    ) -> tuple[PyTree[Array], lx.RESULTS, dict[str, Any]]:
        """Solve; see the class for the options, the result and the stats."""
        structure = state.operator.in_structure()
        _check_matches("vector", vector, structure)
        work = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, _wide(s.dtype)), structure)
        max_steps = self.max_steps
        if max_steps is None:
            max_steps = min(10 * max(tree.size(structure), 1), 1000)

        b = tree.cast(vector, work)
        b = tree.scale(-1.0, b) if state.negated else b
        matvec, has_convolution = _trace(state.operator, tree.cast(b, structure), work)
        precondition = _preconditioner(options.get("preconditioner"), structure, work)

        bb = _dot(b, b)
        dtype = bb.dtype
        radius = options.get("radius")
        if isinstance(radius, (int, float)) and radius < 0:
            raise ValueError(f"CG: radius must be non-negative, got {radius}.")
        radius = None if radius is None else jnp.asarray(radius, dtype)

        y0 = options.get("y0")
        if y0 is not None:
            _check_matches("options['y0']", y0, structure)
            y0 = tree.cast(y0, work)
            y0 = y0 if radius is None else _into_ball(y0, radius)
        carry, warm = _start(b, bb, y0, precondition)
        if self.relative_decrease is not None:
            history = jnp.zeros((max_steps + 1,), dtype)
            carry = carry._replace(history=history)
        # A recursive residual below eps²‖b‖ says nothing more about x, but lets pᵀA p underflow
        # to zero, which would read as negative curvature.
        rtol = jnp.maximum(jnp.asarray(self.rtol, dtype), jnp.finfo(dtype).eps ** 2)
        tolerance = jnp.asarray(self.atol, dtype) + rtol * jnp.sqrt(bb)
        # False for the residual of a warm start, which is not known yet (NaN).
        done = (carry.status != _code(StopReason.nonfinite)) & (jnp.sqrt(carry.rr) <= tolerance)
        carry = carry._replace(status=jnp.where(done, _code(StopReason.converged), carry.status))
        zero_start = _dot(carry.x, carry.x) == 0 if warm else True

        def refresh_at(trip):
            """Whether this trip recomputes the residual instead of making a step."""
            if self.residual_every is not None:
                return (trip - warm) % (self.residual_every + 1) == self.residual_every
            return trip == 0 if warm else False

        def next_trip(carry: _Carry, trip, masked: bool) -> _Carry:
            refresh = refresh_at(trip)
            # A step before a recomputed residual leaves it the choice of the next direction.
            defer = False if self.residual_every is None else refresh_at(trip + 1)
            update = self._step(carry, refresh, matvec, b, radius, zero_start, max_steps, tolerance)
            return self._direct(carry, *update, defer, precondition, masked)

        if self._unrolls(has_convolution):
            trip = 0
            steps = 0
            while steps < max_steps:
                steps += not refresh_at(trip)
                carry = next_trip(carry, trip, masked=True)
                trip += 1
        else:
            carry = jax.lax.while_loop(
                lambda carry: carry.status == _RUNNING,
                lambda carry: next_trip(carry, carry.trip, masked=False),
                carry,
            )
        return self._report(carry, b, bb, vector, radius, max_steps, structure, state.negated)

    def _unrolls(self, has_convolution: bool) -> bool:
        if self.unroll is not None:
            return self.unroll
        short = self.max_steps is not None and self.max_steps <= _MAX_AUTO_UNROLL
        return short and has_convolution and jax.default_backend() == "cpu"

    def _step(self, carry, refresh, matvec, b, radius, zero_start, max_steps, tolerance):
        """The product with A, the new x, r and φ, and the status as far as they decide it."""
        product = matvec(_select(refresh, carry.x, carry.p))
        curvature = _dot(carry.p, product)
        usable = jnp.isfinite(curvature)  # so every entry of the product is finite, too
        positive = (curvature > 0) | refresh
        alpha = jnp.where(positive, carry.gamma / jnp.where(curvature > 0, curvature, 1), 0)
        if radius is None:
            bounded, leave = False, False
        else:
            bounded = jnp.isfinite(radius)
            tau, length = _to_boundary(carry.x, carry.p, alpha, radius)
            leave = bounded & jnp.logical_not(refresh) & ((length >= radius**2) | ~positive)
            alpha = jnp.where(leave, tau, alpha)
        # Nocedal & Wright, Algorithm 7.1: the first direction itself, were there nothing better.
        first = (carry.step == 0) & zero_start & ~positive & jnp.logical_not(bounded)
        alpha = jnp.where(first, 1, jnp.where(refresh, 0, alpha))

        x = _add_scaled(carry.x, alpha, carry.p)
        r = _select(refresh, tree.sub(b, product), _add_scaled(carry.r, -alpha, product))
        rr = _dot(r, r)
        phi = _model(x, b, r)
        usable = usable & jnp.isfinite(alpha) & jnp.isfinite(rr) & jnp.isfinite(phi)
        moved = positive | leave | first
        step = carry.step + (moved & jnp.logical_not(refresh)).astype(jnp.int32)

        status = jnp.where(step >= max_steps, _code(StopReason.max_steps), jnp.int32(_RUNNING))
        history = carry.history
        if history is not None:
            history = jax.lax.dynamic_update_index_in_dim(history, phi, step, 0)
            status = jnp.where(
                _model_stalls(history, step, phi, self.relative_decrease),
                _code(StopReason.relative_decrease),
                status,
            )
        status = jnp.where(jnp.sqrt(rr) <= tolerance, _code(StopReason.converged), status)
        status = jnp.where(leave, _code(StopReason.boundary), status)
        status = jnp.where(positive, status, _code(StopReason.negative_curvature))
        new = carry._replace(x=x, r=r, rr=rr, phi=phi, step=step, status=status, history=history)
        return new, usable

    def _direct(self, old, new, usable, defer, precondition, masked) -> _Carry:
        """The next direction, p ← M r + β p with β = γ₊/γ, and the choice of what to keep."""
        z = precondition(new.r)
        gamma = _dot(new.r, z)
        status = _check_gamma(gamma, new.status)
        status = jnp.where(usable, status, _code(StopReason.nonfinite))
        # A solve that starts by computing its residual has no direction before: β = 0.
        beta = jnp.where(old.gamma > 0, gamma / jnp.where(old.gamma > 0, old.gamma, 1), 0)
        p = _select(defer, old.p, _add_scaled(z, beta, old.p))
        gamma = _select(defer, old.gamma, gamma)
        new = new._replace(p=p, gamma=gamma, status=status)

        # `where` and never `lax.cond`: see `unroll`.
        active = old.status == _RUNNING if masked else True
        kept = tree.where(usable & active, new, old)
        return kept._replace(status=_select(active, status, old.status), trip=old.trip + 1)

    def _report(self, carry, b, bb, vector, radius, max_steps, structure, negated):
        results = lx.RESULTS
        failed = (carry.status == _code(StopReason.nonfinite)) | (
            carry.status == _code(StopReason.indefinite_preconditioner)
        )
        indefinite = carry.status == _code(StopReason.negative_curvature)
        unbounded = True if radius is None else ~jnp.isfinite(radius)
        result = results.where(
            failed | (indefinite & unbounded), results.breakdown, results.successful
        )
        if not (_is_zero(self.rtol) and _is_zero(self.atol)):
            limit = carry.status == _code(StopReason.max_steps)
            result = results.where(limit, results.max_steps_reached, result)
        result = results.where(tree.all_finite(vector), result, results.nonfinite_input)

        # A x = b − r, hence xᵀA x = 2 (φ + bᵀx) without a product.
        sign = -1 if negated else 1
        stats = {
            "num_steps": carry.step,
            "max_steps": jnp.asarray(max_steps, jnp.int32),
            "stop": carry.status,
            "residual_norm": jnp.sqrt(carry.rr) / jnp.where(bb == 0, 1, jnp.sqrt(bb)),
            "quadratic": sign * carry.phi,
            "curvature": sign * 2 * (carry.phi + _dot(b, carry.x)),
        }
        return tree.cast(carry.x, structure), result, stats

    def transpose(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """State and options for Aᵀ: the preconditioner is kept, the warm start is not."""
        if options.get("radius") is not None:
            raise ValueError(
                "CG: the solution within a trust radius is not a linear function of the vector "
                "and cannot be transposed. Differentiate a solve without options['radius'], or "
                "stop gradients at its inputs with `jax.lax.stop_gradient`."
            )
        return _map_state(lambda op: op.transpose(), state, options)

    def conj(self, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
        """State and options for the conjugate of A: the preconditioner is kept."""
        return _map_state(lx.conj, state, options)

    def assume_full_rank(self) -> bool:
        """True: derivatives are those of A⁻¹b."""
        return True


def _start(b, bb, y0, precondition) -> tuple[_Carry, int]:
    """The first carry, and 1 where the first trip is to compute the residual of a warm start."""
    status = jnp.where(jnp.isfinite(bb), jnp.int32(_RUNNING), _code(StopReason.nonfinite))
    zero, none, zeros = jnp.zeros_like(bb), jnp.zeros((), jnp.int32), tree.zeros_like(b)
    if y0 is not None:
        # b = 0 has the solution 0, from wherever one starts.
        null = bb == 0
        status = jnp.where(null, _code(StopReason.converged), status)
        x = tree.where(null | ~tree.all_finite(y0), zeros, y0)
        unknown = jnp.where(null, zero, jnp.nan)
        return _Carry(x, zeros, zeros, zero, unknown, unknown, none, none, status, None), 1
    z = precondition(b)
    gamma = _dot(b, z)
    status = _check_gamma(gamma, status)
    status = jnp.where(bb == 0, _code(StopReason.converged), status)
    return _Carry(zeros, b, z, gamma, bb, zero, none, none, status, None), 0


def _check_gamma(gamma: Scalar, status: Int[Array, ""]) -> Int[Array, ""]:
    """γ = rᵀM r is a squared norm: there is no next step unless it is positive and finite."""
    # Where another reason already ended the solve, the next direction does not matter.
    undecided = (status == _RUNNING) | (status == _code(StopReason.max_steps))
    found = jnp.where(
        jnp.isfinite(gamma),
        _code(StopReason.indefinite_preconditioner),
        _code(StopReason.nonfinite),
    )
    good = (gamma > 0) & jnp.isfinite(gamma)
    return jnp.where(undecided & ~good, found, status)


def _into_ball(x: PyTree[Array], radius: Scalar) -> PyTree[Array]:
    length = jnp.sqrt(_dot(x, x))
    factor = jnp.where(length > radius, radius / jnp.where(length > 0, length, 1), 1)
    return jax.tree.map(lambda leaf: factor.astype(leaf.dtype) * leaf, x)


def _to_boundary(x, p, alpha, radius) -> tuple[Scalar, Scalar]:
    """The τ ≥ 0 with ‖x + τp‖ = Δ (Steihaug 1983, eq. 2.3), and ‖x + αp‖²."""
    xx, xp, pp = _dot(x, x), _dot(x, p), _dot(p, p)
    length = xx + alpha * (2 * xp + alpha * pp)
    gap = jnp.maximum(radius**2 - xx, 0)
    root = jnp.sqrt(xp**2 + pp * gap)
    # The form of the root that does not cancel.
    tau = jnp.where(
        xp > 0,
        gap / jnp.where(xp > 0, xp + root, 1),
        (root - xp) / jnp.where(pp > 0, pp, 1),
    )
    return tau, length


def _model(x: PyTree[Array], b: PyTree[Array], r: PyTree[Array]) -> Scalar:
    """φ(x) = ½ xᵀA x − bᵀx = −½ xᵀ(b + r), as A x = b − r."""
    return -0.5 * _dot(x, tree.add(b, r))


def _model_stalls(history, step, phi, epsilon) -> Bool[Array, ""]:
    """Martens (2010, §4.4): k > K, φ_k < 0, (φ_k − φ_{k−K})/φ_k < K ε, K = max(10, 0.1 k)."""
    window = jnp.maximum(10, (step + 9) // 10)
    before = jax.lax.dynamic_index_in_dim(history, jnp.maximum(step - window, 0), 0, keepdims=False)
    # Multiplied by φ_k < 0, which turns the inequality round.
    bound = window.astype(phi.dtype) * jnp.asarray(epsilon, phi.dtype) * phi
    return (step > window) & (phi < 0) & (phi - before > bound)


def _trace(
    operator: lx.AbstractLinearOperator, example: PyTree[Array], work: PyTree
) -> tuple[Callable[[PyTree[Array]], PyTree[Array]], bool]:
    """The product with A on working vectors, traced once, and whether it has a convolution."""
    # Traced at an actual vector, not at the structure: its sharding then is the right one.
    jaxpr, out = jax.make_jaxpr(operator.mv, return_shape=True)(example)
    run, treedef = jex_core.jaxpr_as_fun(jaxpr), jax.tree.structure(out)

    def matvec(v: PyTree[Array]) -> PyTree[Array]:
        leaves = run(*jax.tree.leaves(tree.cast(v, example)))
        return tree.cast(jax.tree.unflatten(treedef, leaves), work)

    return matvec, _contains(jaxpr, "conv_general_dilated")


def _contains(jaxpr: Any, primitive: str) -> bool:
    """Whether a primitive occurs in a jaxpr or in any jaxpr carried by its equations."""
    # By attribute and not by type: open or closed, alone or in the tuple of a cond's branches.
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for eqn in getattr(jaxpr, "eqns", ()):
        if eqn.primitive.name == primitive:
            return True
        for value in eqn.params.values():
            inner = value if isinstance(value, (tuple, list)) else (value,)
            if any(_contains(item, primitive) for item in inner):
                return True
    return False


def _preconditioner(
    operator: lx.AbstractLinearOperator | None, structure: PyTree, work: PyTree
) -> Callable[[PyTree[Array]], PyTree[Array]]:
    if operator is None:
        return lambda r: r
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise ValueError(
            f"CG: options['preconditioner'] must be a lineax operator, got {type(operator)}."
        )
    for side in (operator.in_structure(), operator.out_structure()):
        _check_matches("options['preconditioner']", side, structure)
    if not lx.is_positive_semidefinite(operator):
        raise ValueError(
            "CG: the preconditioner must be positive semidefinite; tag it with "
            f"`lx.positive_semidefinite_tag`. Got a {type(operator).__name__}."
        )
    operator = lx.linearise(operator)
    inner = operator.in_structure()
    return lambda r: tree.cast(operator.mv(tree.cast(r, inner)), work)


def _map_state(function, state: _State, options: dict[str, Any]) -> tuple[_State, dict[str, Any]]:
    mapped = {}
    if options.get("preconditioner") is not None:
        mapped["preconditioner"] = function(options["preconditioner"])
    return _State(function(state.operator), state.negated), mapped


def _wide(dtype: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):
        return tree.accumulation_dtype(dtype)


def _dot(a: PyTree[Array], b: PyTree[Array]) -> Scalar:
    # Leaves of different dtypes are reduced in the widest of them.
    with jax.numpy_dtype_promotion("standard"):
        return tree.dot(a, b)


def _add_scaled(a: PyTree[Array], c: Scalar, b: PyTree[Array]) -> PyTree[Array]:
    with jax.numpy_dtype_promotion("standard"):
        return tree.add_scaled(a, c, b)


def _select(condition: bool | Bool[Array, ""], a: Any, b: Any) -> Any:
    """`where` that leaves no operation behind for a condition known when tracing."""
    if isinstance(condition, bool):
        return a if condition else b
    return tree.where(condition, a, b)


def _code(reason: StopReason) -> Int[Array, ""]:
    return jnp.int32(reason.value)


def _is_zero(tolerance: ScalarLike) -> bool:
    return isinstance(tolerance, (int, float)) and tolerance == 0


def _shapes(a: PyTree) -> Any:
    return jax.tree.structure(a), [x.shape for x in jax.tree.leaves(a)]


def _check_matches(name: str, a: PyTree, structure: PyTree) -> None:
    if _shapes(a) != _shapes(structure):
        raise ValueError(
            f"CG: {name} has structure {jax.eval_shape(lambda: a)}, but the operator has "
            f"in_structure {structure}."
        )
