"""The mistakes that the tests must find, a row each; `mutations` runs them, a test holds every old text to the package.

The first nine are those that once survived.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutation(NamedTuple):
    """One mistake: `old`, which stands once in `file`, becomes `new`; one of `tests` must fail.

    `equivalent`: why no number changes, for a row that must survive.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


def _in(folder: str, *rows: tuple[str, str, str, str, str]) -> tuple[Mutation, ...]:
    """Rows of one folder of the package: (file, name, old, new, tests by a space)."""
    return tuple(
        Mutation(
            name,
            f"oversquash_lens/{folder}/{file}.py".replace("//", "/"),
            old,
            new,
            tuple(f"tests/{each}" for each in tests.split()),
        )
        for file, name, old, new, tests in rows
    )


REFERENCE = "test_reference.py::test_every_structure_is_a_sum_over_all_paths"
FAMILIES = "test_reference.py::test_bounds_and_estimate_of_every_family_are_sums_over_all_paths"
ANEW = "test_reference.py::test_rows_made_anew_give_the_same_numbers"
BOUNDS = "test_bounds.py::test_variant_equals_sum_over_all_paths"
ESTIMATE = "test_mean_field.py::test_equals_sum_over_all_paths"
FLOWED = "test_flow.py::test_equals_a_sum_over_all_paths"
JACOBIANS = "test_jacobian.py::test_exact_equals_row_by_row_autograd"
DISTANCES = "test_collapse.py::test_every_number_is_what_two_whole_passes_give"
READINGS = "test_readings.py::test_each_last_token_is_that_of_a_pass_of_its_own"
BATCHED = "test_batch.py::test_a_batch_is_each_prompt_by_itself"

ONCE_SURVIVED = _in(
    "",
    (
        "capture/weights",
        "a post-norm's gain by coordinate in calibrated_full",
        '"worst_output_factor": None if post is None else _factor(bare) * _largest(post),',
        '"worst_output_factor": None if post is None else _factor(output),',
        REFERENCE,
    ),
    (
        "paths/edges",
        "the divisor of the queries' own norm dropped from the bound",
        "query_side = query_side / (scale * to_float64(",
        "query_side = query_side / (1.0 * to_float64(",
        REFERENCE,
    ),
    (
        "paths/edges",
        "the divisor of the queries' own norm dropped from the estimate",
        "to_float64(divisors) * to_float64(gains.query_scale[block.index, :, positions])",
        "to_float64(divisors)[None].expand_as(gains.query_scale[block.index, :, positions])",
        REFERENCE,
    ),
    (
        "paths/blocks",
        "the divisor of the keys' own norm multiplied",
        'moved.div_(self.layer.per_position("key_scale")',
        'moved.mul_(self.layer.per_position("key_scale")',
        REFERENCE,
    ),
    (
        "capture/weights",
        "max|γ| of the keys' own norm dropped",
        '"key_norm": torch.linalg.svdvals(key)[:, 0] * _largest(w.key_gain),',
        '"key_norm": torch.linalg.svdvals(key)[:, 0],',
        REFERENCE,
    ),
    (
        "paths/edges",
        "ρ instead of ρ² of a post-norm in the estimate",
        "attention_post_scale[block.index, positions]).square().reciprocal()",
        "attention_post_scale[block.index, positions]).reciprocal()",
        REFERENCE,
    ),
    (
        "paths/edges",
        "the node gain of a parallel MLP counted twice",
        "return None if self.recorded.parallel else self.gains.node_gain.log()",
        "return self.gains.node_gain.log()",
        REFERENCE,
    ),
    (
        "capture/layer",
        "eps of the norm of queries and keys dropped",
        "/ x.shape[-1] + self.context.architecture.eps",
        "/ x.shape[-1]",
        REFERENCE,
    ),
    (
        "capture/checks",
        "the check of the window loose by one",
        "beyond = pattern * (rows[:, None] - src >= window)",
        "beyond = pattern * (rows[:, None] - src > window)",
        "test_checks.py",
    ),
    (
        "capture/checks",
        "NaN passes check_sum",
        "if not off <= TOLERANCE[dtype] * update.abs().max().item() + rounding:",
        "if off > TOLERANCE[dtype] * update.abs().max().item() + rounding:",
        "test_checks.py",
    ),
)

PATHS = _in(
    "paths",
    ("recursion", "the node gain of another layer", "kind.log_node_gain[layer])", "kind.log_node_gain[0])", REFERENCE),
    (
        "recursion",
        "the last position is the one before",
        "row[-1] = 0.0",
        "row[-2] = 0.0",
        "test_bounds.py::test_last_row_is_the_last_token_alone",
    ),
    (
        "recursion",
        "no way out of underflow",
        "FAINT = 1e-250",
        "FAINT = 0.0",
        "test_bounds.py::test_far_tokens_do_not_underflow",
    ),
    (
        "recursion",
        "the shift of a row lost",
        "products[i] = products[i].log() + shifts[i]",
        "products[i] = products[i].log()",
        "test_bounds.py::test_two_hundred_layers_do_not_overflow",
    ),
    (
        "kinds",
        "proof multiplies by β₃",
        "x.log_mlp_factors.sum().item() - math.log(x.beta_3)",
        "x.log_mlp_factors.sum().item() + math.log(x.beta_3)",
        BOUNDS,
    ),
    (
        "kinds",
        "theorem_5_1 divides by β₁",
        "x.mean_attention(1 / x.beta_2, residual=x.one)",
        "x.mean_attention(1 / x.beta_1, residual=x.one)",
        BOUNDS,
    ),
    (
        "kinds",
        "the residual stream of multi_head counted whole",
        "residual=x.one / x.n_heads)",
        "residual=x.one)",
        BOUNDS,
    ),
    (
        "kinds",
        "min for max in the constant of multi_head",
        "x.log_mlp_factors.max().item()",
        "x.log_mlp_factors.min().item()",
        BOUNDS,
    ),
    ("kinds", "the estimate is no root", "    power=0.5,\n", "    power=1.0,\n", ESTIMATE),
    (
        "edges",
        "d_model dropped from the estimate's constant",
        "self.recorded.about.d_model * gains.final_gain_square",
        "gains.final_gain_square",
        ESTIMATE,
    ),
    (
        "edges",
        "a parallel MLP dropped from the bound's diagonal",
        "diagonal = 1 + lipschitz if self.recorded.parallel",
        "diagonal = 1 + 0 * lipschitz if self.recorded.parallel",
        REFERENCE,
    ),
    (
        "edges",
        "the bound's node of a parallel MLP counted twice",
        "return None if self.recorded.parallel else torch.log1p(self.gains.mlp_lipschitz)",
        "return torch.log1p(self.gains.mlp_lipschitz)",
        REFERENCE,
    ),
    (
        "edges",
        "half of the interference with the residual stream",
        "residual + 2 * _interference(block)",
        "residual + _interference(block)",
        ESTIMATE,
    ),
    (
        "edges",
        "d_head dropped from the query side",
        "/ (gains.key.shape[-1] * d_model)",
        "/ d_model",
        ESTIMATE,
    ),
    (
        "edges",
        "the key side not squared",
        "torch.where(norm > 0, turned / norm, 0.0).square() / d_model",
        "torch.where(norm > 0, turned / norm, 0.0) / d_model",
        ESTIMATE,
    ),
    (
        "edges",
        "an arithmetic mean of the divisors",
        "scale.cpu().double().log().mean(-1).exp()",
        "scale.cpu().double().mean(-1)",
        BOUNDS,
    ),
    (
        "edges",
        "the last divisor dropped from the bounds' constant",
        "math.log(self.gains.final_gain_max / self.gains.final_scale)",
        "math.log(self.gains.final_gain_max)",
        BOUNDS,
    ),
    (
        "edges",
        "β₃ without max|γ₃|",
        "beta_3 = gains.final_scale / gains.final_gain_max",
        "beta_3 = gains.final_scale",
        BOUNDS,
    ),
    (
        "edges",
        "ρ dropped from the bound's attention",
        "dest=1 / gains.attention_post_scale,",
        "dest=torch.ones_like(gains.attention_post_scale),",
        REFERENCE,
    ),
    (
        "edges",
        "the score's scale dropped from the estimate's query side",
        "to_float64(square) * to_float64(scale).square() /",
        "to_float64(square) /",
        ESTIMATE,
    ),
    (
        "blocks",
        "keys' squares without their mean",
        "(_row_sums(rows, square) - mean.square().sum(-1))",
        "_row_sums(rows, square)",
        ESTIMATE,
    ),
    (
        "blocks",
        "cancelled distances are kept",
        "CANCELLED = 1e-3",
        "CANCELLED = 0.0",
        "test_profiles.py::test_distances_survive_cancellation_in_float32",
    ),
    (
        "blocks",
        "the queries' lengths of other rows",
        "queries = self.gains.query_norm[self.index][:, self.start : self.stop].to(moved)",
        "queries = self.gains.query_norm[self.index][:, : self.stop - self.start].to(moved)",
        "test_profiles.py::test_a_block_holds_what_the_definitions_say",
    ),
    (
        "flow",
        "an edge's part from the layer above",
        "below = self.log_below[layer, :stop]",
        "below = self.log_below[layer + 1, :stop]",
        FLOWED,
    ),
    (
        "flow",
        "what leaves in place of what enters",
        "entered = node[1:, None]",
        "entered = node[:-1, None]",
        FLOWED,
    ),
    (
        "flow",
        "the node gain of another layer on the way up",
        "column = column + paths.log_node_gain[layer]",
        "column = column + paths.log_node_gain[0]",
        FLOWED,
    ),
    (
        "heaviest",
        "the part from the layer above",
        "flow.log_below[layer, :stop]).log_softmax(-1)",
        "flow.log_below[layer + 1, :stop]).log_softmax(-1)",
        "test_heaviest.py::test_heaviest_paths_are_the_heaviest_of_all",
    ),
    (
        "squashing",
        "shares of squares",
        "return (flow.log_above[0] * flow.power).softmax(-1)",
        "return flow.log_above[0].softmax(-1)",
        "test_squashing.py::test_the_null_model_is_the_same_model_with_uniform_attention",
    ),
)

JACOBIAN = _in(
    "jacobian",
    ("products", "the truth of the position before the last", "y[0, -1]\n", "y[0, -2]\n", JACOBIANS),
    (
        "products",
        "norms are not held fixed",
        "keys += architecture.scale_hooks()",
        "keys += []",
        JACOBIANS,
    ),
    (
        "products",
        "a folded gain is not put back",
        "return output if architecture.restore_gain is None else output * architecture.restore_gain.to(output)",
        "return output",
        "test_record.py::test_folding_changes_the_truth_only_where_the_gain_is_not_known",
    ),
    (
        "products",
        "what float16 was divided by is not multiplied back",
        "return rows * size.view(-1, 1, 1, 1).to(rows)",
        "return rows",
        "test_products.py::test_half_precision_loses_no_more_than_the_whole_graph_does",
    ),
    (
        "products",
        "a block that answers otherwise the second time",
        "self._check_same(layer, leaving.detach())",
        "leaving.detach()",
        "test_products.py::test_a_hook_that_does_another_thing_the_second_time_is_found_out",
    ),
    (
        "measured",
        "a sum of squares for their mean",
        "values = squares.mean(1).sqrt()",
        "values = squares.sum(1).sqrt()",
        "test_jacobian.py::test_probes_agree_with_exact_within_their_standard_error",
    ),
    (
        "measured",
        "an error larger by √2",
        "(alike / (2 * len(rows))).sqrt()",
        "(alike / len(rows)).sqrt()",
        "test_soundness.py::test_one_probe_states_the_largest_error_possible",
    ),
    (
        "measured",
        "the smallest singular value",
        "torch.linalg.eigvalsh(unit @ unit.mT)[:, -1]",
        "torch.linalg.eigvalsh(unit @ unit.mT)[:, 0]",
        JACOBIANS,
    ),
    (
        "measured",
        "the probes' own scatter has no bias",
        "probed.log() - bias",
        "probed.log()",
        "test_corrected.py::test_is_the_posterior_of_jointly_normal_logs",
    ),
)

COLLAPSE = _in(
    "collapse",
    (
        "lemmas",
        "B.2's sharp bound twice too wide",
        "(difference.max() - difference.min()).item() / 4)",
        "(difference.max() - difference.min()).item() / 2)",
        "test_lemmas.py",
    ),
    ("lemmas", "a wrong sign in B.1", "others * (-spread).exp()", "others * spread.exp()", "test_lemmas.py"),
    ("lemmas", "a counting limit off by one", "int(apart[-1]) + 2", "int(apart[-1]) + 1", "test_lemmas.py"),
    ("pairs", "a mean for a sum in L1", '"l1": change.sum(1)', '"l1": change.mean(1)', DISTANCES),
    (
        "pairs",
        "relative to the second prompt",
        "return (change / values[self.first].norm(dim=1)).cpu()",
        "return (change / values[self.second].norm(dim=1)).cpu()",
        DISTANCES,
    ),
    (
        "pairs",
        "the attention row of the first prompt",
        "values[:, second].masked_fill(~self.covered",
        "values[:, first].masked_fill(~self.covered",
        DISTANCES,
    ),
    (
        "curve",
        "collapsed one length early",
        "first = int(apart[-1]) + 1",
        "first = int(apart[-1])",
        "test_collapse.py::test_collapsed_below_epsilon",
    ),
    (
        "precision",
        "one step too many",
        "steps = 2 ** (bits - 1) - 1",
        "steps = 2 ** (bits - 1)",
        "test_precision.py::test_fake_quantised_by_plain_loops",
    ),
    (
        "precision",
        "the finer of two formats' spacings",
        "return max(torch.finfo(STORAGE[name]).eps",
        "return min(torch.finfo(STORAGE[name]).eps",
        "test_precision.py::test_every_format_is_read_back_from_its_name",
    ),
    (
        "precision",
        "weights that are not put back",
        'afterwards.callback(setattr, parameter, "data", parameter.data)',
        "parameter.data",
        "test_precision.py::test_given_back_as_it_was",
    ),
)

CAPTURE = _in(
    "capture",
    (
        "layer",
        "the residual before the last",
        "self.context.work(residual[-1])",
        "self.context.work(residual[-2])",
        "test_record.py::test_residuals_are_those_of_run_with_cache",
    ),
    (
        "layer",
        "lengths of queries before their norm",
        'self.kept["query_norm"] = scored_query.norm(dim=-1)',
        'self.kept["query_norm"] = work(query).norm(dim=-1)',
        REFERENCE,
    ),
    (
        "layer",
        "the pull of keys on the plain query",
        "self._key_pull(scored_query)",
        "self._key_pull(work(query))",
        REFERENCE,
    ),
    (
        "attention",
        "a window wider by one in single rows",
        "hidden | (rows[:, None] - src >= self.window)",
        "hidden | (rows[:, None] - src > self.window)",
        "test_attention.py::test_rows_made_anew_are_the_softmax",
    ),
    (
        "attention",
        "a window narrower by one in blocks of rows",
        "weights.triu_(start - first - self.window + 1)",
        "weights.triu_(start - first - self.window + 2)",
        "test_attention.py::test_rows_made_anew_are_the_softmax",
    ),
    (
        "attention",
        "key heads in turn, not in groups",
        "return grouped.repeat_interleave(n_heads // grouped.shape[axis], dim=axis)",
        "return torch.cat([grouped] * (n_heads // grouped.shape[axis]), dim=axis)",
        BOUNDS,
    ),
    (
        "attention",
        "ALiBi's slopes off by one",
        "2 ** (-8 * (i + 1) / power) for i in range(power)",
        "2 ** (-8 * i / power) for i in range(power)",
        "test_attention.py::test_the_bias_is_transformers_alibi",
    ),
    (
        "attention",
        "the sink left out of a row's sum",
        "    if sinks is not None:\n        torch.logaddexp",
        "    if False:\n        torch.logaddexp",
        "test_attention.py::test_rows_sum_to_one_and_with_a_sink_to_less",
    ),
    (
        "attention",
        "scores that are not capped",
        "scores.div_(self.soft_cap).tanh_().mul_(self.soft_cap)",
        "scores.div_(self.soft_cap).mul_(self.soft_cap)",
        ANEW,
    ),
    (
        "mlp",
        "ρ dropped from lip",
        "sigma = sigma / to_float64(state.post_norm.scale)",
        "sigma = sigma / 1.0",
        REFERENCE,
    ),
    (
        "mlp",
        "the MLP's divisor dropped from the node gain",
        "out = (hidden @ self.w_out) / state.scale[:, None]",
        "out = hidden @ self.w_out",
        ESTIMATE,
    ),
    (
        "mlp",
        "biases left in the radial part",
        "radial = (state.pre[0] - offsets[0]).mul_(slopes[0])",
        "radial = (state.pre[0] - 0).mul(slopes[0])",
        ESTIMATE,
    ),
    (
        "mlp",
        "the projection of a norm behind dropped from the node gain",
        "return (out - along[:, :, None] * unit) * (",
        "return out * (",
        REFERENCE,
    ),
    (
        "mlp",
        "pairs count the trace once",
        "torch.maximum(2 * diagonal - 1 + square, diagonal.square())",
        "torch.maximum(diagonal + square, diagonal.square())",
        "test_mean_field.py::test_probed_node_gain_is_unbiased",
    ),
    (
        "mlp",
        "the same probes in every layer",
        "(seed * 1_000_003 + layer)",
        "(seed * 1_000_003 + 0)",
        "test_mean_field.py::test_node_probes_are_drawn_anew_in_every_layer",
    ),
    (
        "mlp",
        "the least slope for the largest",
        "steepest = [to_float64(slope.abs().amax(1)) for slope in slopes]",
        "steepest = [to_float64(slope.abs().amin(1)) for slope in slopes]",
        BOUNDS,
    ),
    (
        "mlp",
        "experts without their norm's gain",
        "inside = inside * w.mlp_gain.to(inside)\n",
        "inside = inside * 1.0\n",
        FAMILIES,
    ),
    (
        "mlp",
        "a module's hooks that do not come back",
        "point._forward_hooks, point._backward_hooks = forward, backward",
        "point._forward_hooks, point._backward_hooks",
        "test_mean_field.py::test_experts_are_run_again_without_the_users_hooks_which_stay",
    ),
    (
        "weights",
        "centring left out of queries and keys",
        "return weight - weight.mean(1, keepdim=True) if architecture.centred else weight",
        "return weight",
        ESTIMATE,
    ),
    (
        "weights",
        "max|γ| of a post-norm dropped from ‖OV‖",
        '"ov_norm": _product_norm(value, bare) * _largest(post),',
        '"ov_norm": _product_norm(value, bare),',
        REFERENCE,
    ),
    (
        "weights",
        "max|γ| of the queries' own norm dropped",
        '"query_norm": torch.linalg.svdvals(query)[:, 0] * _largest(w.query_gain),',
        '"query_norm": torch.linalg.svdvals(query)[:, 0],',
        REFERENCE,
    ),
    (
        "weights",
        "max|γ| of the norm behind the MLP dropped",
        "w.mlp.output) * _largest(w.mlp_post_gain)",
        "w.mlp.output)",
        REFERENCE,
    ),
    (
        "weights",
        "biases of the wrong heads",
        "return bias[:: bias.shape[0] // heads]",
        "return bias[:heads]",
        BOUNDS,
    ),
    (
        "weights",
        "the mean for the largest gain",
        "to_float64(gain).abs().max().item()",
        "to_float64(gain).abs().mean().item()",
        REFERENCE,
    ),
    (
        "weights",
        "gains that outlive an edit of the weights",
        "if model not in _known or _known[model][0] != mark:",
        "if model not in _known:",
        "test_record.py::test_edited_weights_are_measured_anew",
    ),
    (
        "checks",
        "a tolerance a hundred times wider",
        "torch.float64: 1e-4, torch.float32: 1e-3,",
        "torch.float64: 1e-2, torch.float32: 1e-1,",
        "test_checks.py",
    ),
    (
        "checks",
        "rows that need not sum to 1",
        "if wrong.any() and pattern[wrong].any():",
        "if False and pattern[wrong].any():",
        "test_gate.py::test_a_spoiled_pattern",
    ),
    (
        "checks",
        "attention to the next position passes",
        "return pattern.triu(1).abs().amax().item()",
        "return pattern.triu(2).abs().amax().item()",
        "test_gate.py::test_a_spoiled_pattern",
    ),
    (
        "checks",
        "what the pattern mixes is not looked at",
        'check_same(name, mixed.transpose(0, 1), z, "pattern · v", "hook_z", z.dtype)',
        "mixed.transpose(0, 1)",
        "test_gate.py::test_output_and_scores_of_grouped_heads",
    ),
    (
        "checks",
        "sinks are not held against the rows' sums",
        'check_same(name, share, sums, "the softmax beside the sink", "the rows\' sums", pattern.dtype)',
        "share.sum()",
        "test_checks.py",
    ),
    (
        "checks",
        "the divisor of a norm that stands elsewhere",
        "wrong = ~(off <= 2 * TOLERANCE[architecture.dtype] * shown.square())",
        "wrong = off < 0",
        "test_sabotage.py::test_a_norm_is_misplaced",
    ),
    (
        "recorder",
        "the last residual but one",
        'self.kept["last"] = self.context.work(residual[-1])',
        'self.kept["last"] = self.context.work(residual[-2])',
        "test_record.py::test_residuals_are_those_of_run_with_cache",
    ),
    (
        "recorder",
        "the square of the mean gain",
        "final_gain_square=gain.square().mean().item(),",
        "final_gain_square=gain.mean().square().item(),",
        ESTIMATE,
    ),
    (
        "recorder",
        "logits that nobody compares",
        'checks.check_same(name, own, logits.detach()[0, -1].to(own.device), "y · W_U + b_U", "its logits", dtype)',
        "logits.detach()",
        "test_sabotage.py::test_the_logits_are_not_those_of_what_the_unembedding_reads",
    ),
    (
        "readings",
        "the largest shift for their mean",
        "shift = rows.diff(dim=1).abs_().sum(2).mean(0)",
        "shift = rows.diff(dim=1).abs_().sum(2).amax(0)",
        READINGS,
    ),
    (
        "readings",
        "the weight on the token before",
        "rows[:, 1:].diagonal(past + first, 1, 2)",
        "rows[:, 1:].diagonal(past + first - 1, 1, 2)",
        READINGS,
    ),
    (
        "readings",
        "a shared pass that nobody compares",
        "if _as_alone(subject, sequences, way, found):",
        "if found:",
        "test_readings.py::test_a_cache_that_lies_is_found_out",
    ),
    (
        "prefixes",
        "a token that does not see itself",
        "(order[:, None] >= order)",
        "(order[:, None] > order)",
        READINGS,
    ),
    (
        "prefixes",
        "places behind a fork off by one",
        "torch.arange(fork, fork + size, device",
        "torch.arange(fork + 1, fork + 1 + size, device",
        READINGS,
    ),
    (
        "hooks",
        "hooks that stay in a point's list",
        "point.fwd_hooks[:] = [other for other in point.fwd_hooks if other is not handle]",
        "point.fwd_hooks[:] = list(point.fwd_hooks)",
        "test_hooks.py::test_fifty_recordings_leave_every_hook_as_it_was",
    ),
    (
        "hooks",
        "the user's hooks do not come back",
        "    finally:\n        for module, kind, hooks in before:\n            setattr(module, kind, hooks)",
        "    finally:\n        before.clear()",
        "test_hooks.py::test_other_measurements_leave_every_hook_as_it_was",
    ),
    (
        "hooks",
        "logits of the position before the last",
        "return (x[:, -1:], *inputs[1:])",
        "return (x[:, -2:-1], *inputs[1:])",
        "test_attention.py::test_only_the_last_position_is_unembedded",
    ),
    (
        "hooks",
        "the last position of a batch's rows off by one",
        "last = torch.tensor(lengths, device=x.device) - 1",
        "last = torch.tensor(lengths, device=x.device) - 2",
        BATCHED,
    ),
    (
        "proof",
        "no look at what later tokens change",
        "off = (own.logits - other.logits)[:stop].abs().amax(-1) / size",
        "off = 0 * (own.logits - other.logits)[:stop].abs().amax(-1) / size",
        "test_subject.py::test_a_prefix_model_is_refused",
    ),
    (
        "proof",
        "log-probabilities of another function pass",
        "if not most <= TOLERANCE[architecture.dtype]:",
        "if not most <= 1e9 * TOLERANCE[architecture.dtype]:",
        "test_subject.py::test_a_bridge_that_computes_another_function_is_refused_at_every_door",
    ),
    (
        "proof",
        "dropout below one half passes",
        "if isinstance(value, float) and value > 0}",
        "if isinstance(value, float) and value > 0.5}",
        "test_subject.py::test_dropout_is_refused_wherever_it_is",
    ),
    (
        "subject",
        "what was known of a model stays for good",
        "known is None or known.mark != mark:",
        "known is None:",
        "test_subject.py::test_dropout_is_refused_wherever_it_is",
    ),
    (
        "subject",
        "bounds of experts are not refused",
        "bound = _refused_if(architecture.experts, experts)",
        "bound = _refused_if(False, experts)",
        FAMILIES,
    ),
    (
        "tokens",
        "one token too many",
        "if n_ctx and n > n_ctx:",
        "if n_ctx and n > n_ctx + 1:",
        "test_prompt.py::test_prompts_that_are_refused",
    ),
    (
        "tokens",
        "one id too many",
        "int(ids.max()) >= d_vocab:\n",
        "int(ids.max()) > d_vocab:\n",
        "test_prompt.py::test_prompts_that_are_refused",
    ),
    (
        "tokens",
        "special tokens that the user typed are counted as added",
        "added = _ending(ids, special) - _ending(typed, special)",
        "added = _ending(ids, special)",
        "test_prompt.py::test_of_two_special_tokens_behind_a_piece_the_typed_one_stays",
    ),
    (
        "batch",
        "columns of all prompts",
        "return part[:, :, :length, :length] if square else part[:, :length]",
        "return part[:, :, :length, :length] if square else part",
        BATCHED,
    ),
    (
        "batch",
        "a padded row without its last token",
        "rows.append(row[first : last + 1])",
        "rows.append(row[first:last])",
        "test_batch.py::test_ids_that_are_padded_already",
    ),
    (
        "edits",
        "a window wider by one",
        "near = dest - src < width",
        "near = dest - src <= width",
        "test_edits.py::test_cutting_weights_is_masking_scores",
    ),
    (
        "edits",
        "a masked position that does not see itself",
        "(src != position) | (dest == position)",
        "(src != position)",
        "test_edits.py::test_cutting_weights_is_masking_scores",
    ),
    (
        "edits",
        "keys that keep their length under a power",
        'scored = ("query_norm", "key_norm", "key", "key_pull")',
        'scored = ("query_norm", "key_norm", "key_pull")',
        "test_what_if.py::test_sharpening_gives_the_numbers_of_scaled_scores",
    ),
)

ANALYSES = _in(
    "analyses",
    (
        "audit",
        "a bound may be at half the truth",
        "truth.values.log() + math.log1p(-ROUNDING)",
        "truth.values.log() + math.log1p(-0.5)",
        "test_audit.py::test_a_bound_is_broken_from_a_billionth_on",
    ),
    (
        "audit",
        "calibrated against the truth that is not frozen",
        "truth = truths.frozen_spectral if frozen else truths.spectral",
        "truth = truths.spectral",
        "test_audit.py::test_rows_are_against_the_norm_that_they_name",
    ),
    (
        "audit",
        "a median of the upper half",
        "ordered[(len(ordered) - 1) // 2]",
        "ordered[len(ordered) // 2]",
        "test_compare.py test_audit.py::test_rows_are_against_the_norm_that_they_name",
    ),
    (
        "audit",
        "probes that keep their length",
        "(rows.double().norm(dim=2) / covectors.norm(dim=1, keepdim=True)).amax(0)",
        "rows.double().norm(dim=2).amax(0)",
        "test_audit.py::test_probes_find_violations_that_are_certain",
    ),
    (
        "findings",
        "an arithmetic mean imposed",
        "values.log().mean(-1, keepdim=True).exp().expand_as(values)",
        "values.mean(-1, keepdim=True).expand_as(values)",
        "test_findings.py::test_one_constant_for_a_layer_is_the_geometric_mean",
    ),
    (
        "what_if",
        "before over after",
        "(after.log_values(name)[new] - before.log_values(name)[old])",
        "(before.log_values(name)[old] - after.log_values(name)[new])",
        "test_what_if.py::test_changes_are_ratios_token_by_token",
    ),
    (
        "what_if",
        "no room for the repeated token",
        "if n + 1 > architecture.n_ctx:",
        "if n > architecture.n_ctx:",
        "test_what_if.py::test_a_prompt_without_room_for_a_repeated_token",
    ),
)

ROWS: tuple[Mutation, ...] = (*ONCE_SURVIVED, *PATHS, *JACOBIAN, *COLLAPSE, *CAPTURE, *ANALYSES)
