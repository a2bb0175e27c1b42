"""Fused layers: an update computes what the plain one computes, and without a compiler the plain one runs."""

import copy
import shutil
import threading
from contextlib import nullcontext, suppress
from types import SimpleNamespace

import pytest
import torch
from small_fused import CASES, COMPILERS, PLAIN_SCANS, batch_of, compiler, make, one_update

from agent.execution import Eager, make_execution
from agent.execution.fused import build, fuse, fuse_modules, fused_layers, scope
from agent.execution.fused.functions import chain
from agent.execution.fused.networks import FusedGRUCore, FusedLoopedCore, FusedMLP
from agent.execution.fused.scope import SCOPE
from agent.execution.fused.world import FusedWorldModel
from agent.learning.actor_critic import LAYERS
from world_model import TwoHot


@pytest.fixture(autouse=True)
def kernels():
    """The layers of a test alone are fused as those of an agent are."""
    scope.Scope.kernels = build.load() if any(map(shutil.which, COMPILERS)) else None


@compiler
@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_same(case):
    config, spaces = CASES[case]
    plain, fused = make(config, spaces), make(config, spaces)
    batch = batch_of(plain)
    (expected, random), (update, same) = one_update(Eager(plain), batch), one_update(make_execution(fused), batch)
    assert isinstance(fused.world, FusedWorldModel)
    assert isinstance(fused.behavior.critic.net, FusedMLP)
    assert isinstance(fused.world.core, FusedLoopedCore) == (config.model.core == "looped")
    assert isinstance(fused.world.core, FusedGRUCore) == (config.model.core == "gru")
    assert torch.equal(random, same), "other random numbers were drawn"
    for name, value in expected.metrics.items():
        torch.testing.assert_close(update.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)
    torch.testing.assert_close(update.states.stoch, expected.states.stoch)
    torch.testing.assert_close(update.states.deter, expected.states.deter, rtol=1e-5, atol=1e-5)
    for name, adam in plain.optimizers.items():
        error = fused.optimizers[name].gradient - adam.gradient
        assert error.norm() < 1e-5 * adam.gradient.norm(), name
    for (name, p), q in zip(plain.policy.named_parameters(), fused.policy.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad).norm() < 1e-4 * p.grad.norm() + 1e-6, name


@compiler
@pytest.mark.parametrize("case", ["vectors", "certified", "two tokens"])
def test_all_loops_are_read_out_at_once(case):
    """States of the loops (R, B, N, D) beside one deter and one gate (B, N, D), as early read-outs are trained."""
    config, spaces = CASES[case]
    plain, fused = make(config, spaces).world.core, make(config, spaces)
    fuse(fused)
    core, loop = fused.world.core, config.model.loop
    torch.manual_seed(0)
    given = [torch.randn(*shape, loop.tokens, loop.width) for shape in ((5,), (3, 5), (5,))]
    results = []
    for module in (plain, core):
        deter, x, gate = (part.clone().requires_grad_() for part in given)
        with fused_layers():
            out = module.readout(deter, x, gate)
        wanted = deter, x, gate, module.coda
        results.append((out, *torch.autograd.grad((out * torch.arange(3.0)[:, None, None, None]).sum(), wanted)))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@compiler
@pytest.mark.parametrize("bins", [95, 33, 7])
def test_two_hot_values_are_the_same(bins):
    plain, fused = TwoHot(bins, 50.0), TwoHot(bins, 50.0)
    fuse_modules(fused)
    torch.manual_seed(0)
    logits, target = 4.0 * torch.randn(6, 9, bins), 30.0 * torch.randn(6, 9)
    target[0, :5] = torch.tensor([0.0, 50.0, -50.0, 1e6, -1e6])
    logits[1] -= 100.0  # all far below 0
    second, weight = torch.randn(6, 9), torch.randn(6, 9)
    for of in (
        lambda values, x: values.mean(x),
        lambda values, x: values.loss(x, target),
        lambda values, x: values.loss(x, target, second, 0.7),
    ):
        results = []
        for values in (plain, fused):
            x = logits.clone().requires_grad_()
            with fused_layers():
                out = of(values, x)
            results.append((out, *torch.autograd.grad((out * weight).sum(), x)))
        assert "TwoHot" in type(results[1][0].grad_fn).__name__
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with fused_layers():
        assert fused.mean(torch.full((3, bins), 7.3)).tolist() == [0.0] * 3
        assert fused.loss(logits[0, 0], torch.tensor(float("nan"))).isnan()


@compiler
def test_logits_and_values_of_a_rollout_are_computed_once(monkeypatch):
    agent = make(*CASES["vectors"])
    execution, counts = make_execution(agent), []
    forward, values = SCOPE.kernels.layer_forward, agent.behavior.values

    def counted(*given):
        counts[-1] += 1
        return forward(*given)

    def watched(rollout):
        counts.append(0)
        monkeypatch.setattr(SCOPE.kernels, "layer_forward", counted)
        result = values(rollout)
        monkeypatch.setattr(SCOPE.kernels, "layer_forward", forward)
        return result

    monkeypatch.setattr(agent.behavior, "values", watched)
    execution.update(batch_of(agent))
    assert counts == [LAYERS + 1]


@compiler
def test_a_copy_has_its_own_weights_and_acting_is_not_fused(monkeypatch):
    agent = make(*CASES["vectors"])
    make_execution(agent)
    monkeypatch.setattr("agent.execution.fused.networks.chain", lambda *_: pytest.fail("acting was fused"))
    other = copy.deepcopy(agent.policy)
    with torch.no_grad():
        other.behavior.actor.net.out.bias.add_(1.0)
    feat = torch.randn(3, agent.world.feat_size)
    assert not torch.allclose(agent.behavior.actor.act(feat, False), other.behavior.actor.act(feat, False))


@compiler
def test_weights_are_read_anew_in_every_update():
    w, x = torch.randn(3, 2), torch.randn(4, 2)
    for _ in range(2):
        with fused_layers():
            torch.testing.assert_close(chain(x, [(w, None, None)]), x @ w.t())
        w.add_(1.0)


@compiler
def test_weights_that_change_inside_are_read_anew_and_an_inner_scope_leaves_the_outer_one_on():
    w, x = torch.randn(3, 2), torch.randn(4, 2)
    with fused_layers():
        chain(x, [(w, None, None)])
        w.add_(1.0)
        torch.testing.assert_close(chain(x, [(w, None, None)]), x @ w.t())
        with fused_layers():
            assert SCOPE.weights
        assert SCOPE.active
        assert SCOPE.weights
    assert not SCOPE.active
    assert not SCOPE.weights


@compiler
@pytest.mark.parametrize("case", ["vectors", "certified", "gru"])
def test_one_frozen_weight_leaves_the_others_their_gradients(case):
    world = make(*CASES[case]).world
    fuse_modules(world)
    core = world.core
    first = core.prelude_in.weight if hasattr(core, "prelude_in") else core.read_deter.linear.weight
    first.requires_grad_(False)
    if hasattr(core, "retention"):
        core.retention.requires_grad_(False)
    state = world.initial(3)
    with fused_layers():
        inputs = torch.randn(3, world.inputs(state, torch.zeros(3, world.action_size)).shape[1])
        out, _ = core(state.deter, inputs, 2, core.prepare())
    out.square().sum().backward()
    no_part = "rule.", "start"  # in a step
    trained = {name: w for name, w in core.named_parameters() if w.requires_grad and not name.startswith(no_part)}
    assert not [name for name, weight in trained.items() if not weight.grad.any()]
    assert not first.grad.any()


@compiler
@pytest.mark.parametrize("width", [9, 40, 56, 61])
def test_rows_without_variance_are_numbers(width):
    """The ends of rows of no whole vectors are taken out of the variance, which rounding may leave below 0."""
    levels = torch.tensor([777.7, 3333.3, 123456.7])[:, None] * (1.0 + 1e-5 * torch.randn(3, 64))
    x, gain = levels.reshape(-1, 1).expand(-1, width), torch.ones(width)
    with fused_layers():
        y = chain(x, [(torch.eye(width), None, gain)])
    assert y.isfinite().all()


@compiler
def test_frozen_weights_have_no_gradient_and_inputs_do():
    w, gain, x = (torch.randn(*shape, requires_grad=True) for shape in ((3, 2), (3,), (4, 2)))
    with fused_layers(), scope.frozen_weights():
        y = chain(x, [(w, None, gain)])
    y.sum().backward()
    assert w.grad is None
    assert gain.grad is None
    assert x.grad.abs().sum() > 0


@compiler
def test_every_thread_is_fused_and_frozen_for_itself():
    """Otherwise the first one to leave ends it for the others, or the last one leaves it on for good."""
    meet = threading.Barrier(2, timeout=10.0)
    with scope.fused_layers(), scope.frozen_weights():
        before = scope.SCOPE.active, scope.SCOPE.frozen

        def other():
            with scope.fused_layers(), scope.frozen_weights(False):
                meet.wait()
                meet.wait()

        thread = threading.Thread(target=other)
        thread.start()
        meet.wait()
        assert (scope.SCOPE.active, scope.SCOPE.frozen) == before
    meet.wait()
    thread.join()
    assert not scope.SCOPE.active
    assert not scope.SCOPE.frozen


def test_a_second_derivative_is_refused():
    x, w = torch.randn(4, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    with fused_layers():
        y = chain(x, [(w, None, None)])
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@compiler
@pytest.mark.parametrize("size", [1, 7, 16, 61, 64, 95, 128])
def test_products_of_every_width(size):
    x, w, bias = torch.randn(11, size), torch.randn(size, size, requires_grad=True), torch.randn(size)
    with fused_layers():
        y = chain(x, [(w, bias, None)])
    torch.testing.assert_close(y, x @ w.t() + bias, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    torch.testing.assert_close(w.grad, 2 * y.detach().t() @ x, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_a_line_says_so_and_the_plain_layers_run(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(scope.Scope, "kernels", None)
    monkeypatch.setattr("agent.execution.fused.modules.load", build.load.__wrapped__)
    agent = make(*CASES["vectors"])
    with pytest.warns(UserWarning, match="layers are not fused, and updates take about twice as long: there is no C"):
        execution = make_execution(agent)
    assert not isinstance(agent.world, FusedWorldModel)
    assert one_update(execution, batch_of(agent))[0].metrics["world/kl"].isfinite()


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="twice as long: no such header$"):
        assert build.load.__wrapped__() is None
    assert not list(tmp_path.glob("**/*.so"))


@compiler
def test_a_compiler_may_be_several_words_and_a_user_without_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"env {next(filter(shutil.which, COMPILERS))}")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.os.path, "expanduser", lambda path: path)  # as of a user that the system does not know
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    assert build.load.__wrapped__() is not None
    assert len(list(tmp_path.glob("looped-dreamer-*/kernels-*.so"))) == 1


def test_where_the_cache_cannot_be_written_a_folder_of_the_users_own_is_taken(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # no folder can be made below it
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    folder = build.cache()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)  # another user may have put code there
    with pytest.raises(OSError, match="can be written by others"):
        build.cache()


def test_a_compiler_with_an_open_quote_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "g++ 'never closed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="No closing quotation"):
        assert build.load.__wrapped__() is None


@compiler
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("case", ["vectors", "certified", "certified, a hidden width of no whole vectors"])
def test_a_scan_with_new_episodes_inside_has_the_same_states_and_gradients(case, start, loops):
    """Rows that begin an episode for some sequences and not for others; the learned start is one of the weights."""
    config, spaces = CASES[case]
    found = []
    for fused in (False, True):
        agent = make(config, spaces)
        batch = batch_of(agent)
        first = torch.zeros_like(batch.is_first)
        first[0, 0] = first[1:3, 2] = first[:, 4] = True
        batch = batch._replace(is_first=first, start=batch.start if start else None)
        if fused:
            fuse(agent)
        torch.manual_seed(1)
        with fused_layers() if fused else nullcontext():
            post = agent.world.observe_sequence(batch, loops)
            loss, _ = agent.world.loss(post, batch)
            weights = dict(agent.world.named_parameters())
            grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        found.append((post, dict(zip(weights, grads, strict=True))))
    (plain, gradients), (scanned, its) = found
    torch.testing.assert_close(scanned.states.deter, plain.states.deter, rtol=1e-5, atol=1e-5)
    assert torch.equal(scanned.states.stoch.argmax(-1), plain.states.stoch.argmax(-1))
    for mine, theirs in zip(scanned.trace, plain.trace, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert gradients["core.start"].abs().sum() > 0
    for name, gradient in gradients.items():
        assert (gradient is None) == (its[name] is None), name
        if gradient is not None:
            assert (gradient - its[name]).norm() < 1e-4 * gradient.norm() + 1e-7, name


@compiler
def test_the_scan_is_one_operation_where_it_can_be(monkeypatch):
    scans = []
    monkeypatch.setattr("agent.execution.fused.world.Scan", SimpleNamespace(apply=lambda *given: scans.append(given)))
    for case in CASES:
        one = case not in PLAIN_SCANS
        agent = make(*CASES[case])
        fuse(agent)
        scans.clear()
        with fused_layers(), suppress(TypeError):  # nothing was computed
            agent.world.observe_sequence(batch_of(agent), 2)
        assert bool(scans) == one, case
