"""Images in the world model: shapes, losses, and that they teach what they show."""

import dataclasses

import pytest
import torch

from world_model import Batch, LoopConfig, ModelConfig, WorldModel
from world_model.vision import ChannelNorm, ConvDecoder, ConvEncoder, ImageConfig, redundancy_loss

SHAPE = (32, 48, 3)


def make_world(**image) -> WorldModel:
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, heads=2, units=16)
    eyes = ImageConfig(**{"depth": 2, "precision": "float32"} | image)
    cfg = ModelConfig(loop=loop, image=eyes, groups=3, classes=4, units=16, bins=21)
    return WorldModel(cfg, {"camera": SHAPE, "joints": 3}, 2)


def make_batch(size: int = 3, length: int = 4) -> Batch:
    gen = torch.Generator().manual_seed(1)
    off = torch.zeros(size, length, dtype=torch.bool)
    return Batch(
        {
            "camera": torch.randint(256, (size, length, *SHAPE), generator=gen, dtype=torch.uint8),
            "joints": torch.randn(size, length, 3, generator=gen),
        },
        torch.rand(size, length, 2, generator=gen),
        torch.randn(size, length, generator=gen),
        off.clone(),
        off.clone(),
        off.clone(),
    )


@pytest.mark.parametrize("halve", ["patch", "stride", "pool"])
def test_encoder_and_decoder_keep_to_their_shapes(halve):
    cfg = ImageConfig(depth=2, halve=halve)
    images = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    assert ConvEncoder(SHAPE, cfg, 7)(images).shape == (5, 7)
    out = ConvDecoder(SHAPE, cfg, 6)(torch.randn(5, 6))
    assert out.shape == (5, *SHAPE)
    assert -0.5 < out.min() < out.max() < 1.5
    out = ConvDecoder(SHAPE, dataclasses.replace(cfg, relative=False), 6)(torch.randn(5, 6))
    assert 0 < out.min() < out.max() < 1


def normed(function, x: torch.Tensor, norm: ChannelNorm) -> tuple[torch.Tensor, ...]:
    """What comes out of function(x), and its gradients in x and in the gain for a loss of unequal weights."""
    x = x.clone().requires_grad_()
    out = function(x)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return (out, *torch.autograd.grad((weight * out).sum(), [x, norm.norm.gain]))


@pytest.mark.parametrize("channels", [2, 3, 16, 48, 256])
def test_the_norm_of_gpus_is_that_of_cpus(channels):
    torch.manual_seed(0)
    norm = ChannelNorm(channels)
    torch.nn.init.normal_(norm.norm.gain)
    x = 3.0 * torch.randn(4, 5, 6, channels) + torch.randn(4, 5, 6, 1)
    x[0, 0] *= 1e-2  # so little that eps matters
    pairs = zip(normed(norm.written_out, x, norm), normed(norm.norm, x, norm), strict=True)
    for name, (mine, expected) in zip(("values", "in x", "in the gain"), pairs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(norm(x.movedim(-1, 1)), norm.written_out(x).movedim(-1, 1), rtol=1e-5, atol=1e-5)


def test_the_norm_of_gpus_computes_in_float32():
    torch.manual_seed(0)
    norm = ChannelNorm(16)
    torch.nn.init.normal_(norm.norm.gain)
    half = (torch.randn(5, 7, 16) + 20.0).bfloat16()  # differences of which bfloat16 would keep little
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = norm.written_out(half)
        assert out.dtype == torch.float32
        assert torch.equal(out, norm.written_out(half.float()))
    torch.testing.assert_close(out, norm.norm(half.float()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("halve", ["patch", "stride", "pool"])
def test_a_decoder_learns_an_image(halve):
    torch.manual_seed(0)
    decoder, feat = ConvDecoder((16, 16, 1), ImageConfig(depth=4, halve=halve), 2), torch.eye(2)
    target = torch.zeros(2, 16, 16, 1)
    target[0, :8], target[1, :, 4:9] = 1.0, 1.0
    adam = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(150):
        loss = (decoder(feat) - target).square().sum((1, 2, 3)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert float(loss.detach()) < 0.05 * 128


def test_an_encoder_sees_how_images_differ_from_the_usual_one():
    """A bright dot on a busy background: what two places of it have in common must not hide where it is."""
    torch.manual_seed(0)
    images = torch.randint(256, (1, 64, 64, 3)).repeat(40, 1, 1, 1).to(torch.uint8)
    for number, image in enumerate(images):
        image[20:24, number : number + 4] = 255 - image[20:24, number : number + 4]
    encoder = ConvEncoder((64, 64, 3), ImageConfig(), 32)

    def variety() -> float:
        """Share of the embedding that is not the same for all."""
        with torch.no_grad():
            seen = encoder(images)
        return float((seen - seen.mean(0)).square().mean() / seen.square().mean())

    before = variety()
    encoder.get_used_to(images)
    assert before < 0.05
    assert variety() > 5 * before
    torch.testing.assert_close(encoder(images[:1]), encoder(images)[:1], atol=1e-5, rtol=1e-5)
    encoder.get_used_to(images[:1].repeat(3, 1, 1, 1))  # all alike: nothing is divided by nothing
    assert torch.isfinite(encoder(images)).all()


def test_latents_of_images_begin_with_something_to_say():
    """The posterior's entropy over that of the uniform distribution, before anything is learned."""
    batch, share = make_batch(), {}
    for first in (1.0, 4.0):
        torch.manual_seed(0)
        world = make_world(first_logits=first)
        world.senses.get_used_to(batch.obs)
        logp = world.observe_sequence(batch).post_logp.detach()
        entropy = -(logp.exp() * logp).sum((-2, -1)).mean()
        share[first] = float(entropy / (logp.shape[-2] * torch.tensor(logp.shape[-1]).log()))
    assert share[4.0] < 0.7 < share[1.0]


def test_an_encoder_may_see_images_as_they_are():
    for relative in (True, False):
        images, batch = make_world(relative=relative).senses.images, make_batch()
        before = images.embed(batch.obs)
        images.get_used_to(batch.obs)
        assert torch.equal(images.embed(batch.obs), before) is not relative


@pytest.mark.parametrize(("spread", "weight"), [(0.4, 0.25), (0.1, 4.0), (0.02, 25.0)])
def test_a_decoder_says_how_images_differ_from_the_usual_one_and_small_differences_weigh_more(spread, weight):
    torch.manual_seed(0)
    world, batch = make_world(), make_batch()
    usual = torch.full(SHAPE, 128)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None, None]
    batch.obs["camera"][:] = (usual + 255 * spread * sign).round().to(torch.uint8)
    images = world.senses.images
    images.get_used_to(batch.obs)
    decoder = images.decoders["camera"]
    assert float(decoder.weight) == pytest.approx(weight, rel=0.05)
    feat = world.observe_sequence(batch).states.feat()
    shown = images.shown(feat)["camera"]
    with torch.no_grad():
        decoder.stages[-2 if isinstance(decoder.stages[-1], torch.nn.PixelShuffle) else -1].weight.zero_()
    nothing = images.shown(feat)["camera"]
    assert torch.allclose(nothing, usual / 255.0, atol=0.01)  # who says nothing says: as usual
    assert 0.05 * spread < float((shown - nothing).detach().std()) < 2 * spread  # and speaks in that size
    loss = images.losses(feat, batch.obs, None)["image"]
    expected = float(decoder.weight) * spread**2 * usual.numel()
    assert torch.allclose(loss, torch.full_like(loss, expected), rtol=0.1)


def test_errors_are_judged_in_float32_whatever_the_features_are():
    world, batch = make_world(precision="bfloat16"), make_batch()
    feat = world.observe_sequence(batch).states.feat().detach()
    images = world.senses.images
    half = feat.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, shown = images.losses(half, batch.obs, None)["image"], images.shown(half)["camera"]
    wrong = (shown - batch.obs["camera"] / 255.0).square().sum((2, 3, 4))
    assert torch.allclose(loss, images.decoders["camera"].weight * wrong, rtol=1e-6)


def test_decoders_of_before_say_colours():
    torch.manual_seed(0)
    old = ConvDecoder(SHAPE, ImageConfig(relative=False), 6)
    plain = {name: value for name, value in old.state_dict().items() if name not in ("mean", "spread")}
    (new, other), feat = [ConvDecoder(SHAPE, ImageConfig(), 6) for _ in range(2)], torch.randn(5, 6)
    assert not torch.equal(new(feat), old(feat))
    new.load_state_dict(plain)
    assert torch.equal(new(feat), old(feat))
    assert new.weight == 1.0
    new.load_state_dict(other.state_dict())
    assert torch.equal(new(feat), other(feat))


def test_losses_and_predictions_of_images_and_vectors_side_by_side():
    world, batch = make_world(scale=2.0), make_batch()
    post = world.observe_sequence(batch)
    losses = world.losses(post, batch)
    guess = world.decode(post.states)
    assert guess["camera"].shape == (3, 4, *SHAPE)
    assert guess["joints"].shape == (3, 4, 3)
    wrong = guess["camera"] - batch.obs["camera"] / 255.0
    assert torch.allclose(losses["image"], 2.0 * wrong.square().sum((2, 3, 4)), rtol=1e-4)
    assert {"image", "reconstruction"} <= losses.keys()
    numbers = world.senses.truth(batch.obs), world.senses.guess(post.states.feat())
    assert [x.shape for x in numbers] == [(3, 4, 3 + 32 * 48 * 3)] * 2
    assert torch.allclose(numbers[1][..., 3:], guess["camera"].flatten(2))


def test_images_lose_their_additional_weight_once_they_were_seen():
    world, batch = make_world(scale=2.0, ease=True, ease_begin=10, ease_end=30), make_batch()
    batch.obs["camera"] //= 32
    world.senses.get_used_to(batch.obs)
    assert world.senses.images.decoders["camera"].weight == 25.0
    post = world.observe_sequence(batch)
    first = world.losses(post, batch)
    for updates, weight in ((10, 25.0), (20, 5.0), (30, 1.0), (500, 1.0)):
        world.senses.ease(updates)
        losses = world.losses(post, batch)
        assert torch.allclose(losses["image"], weight / 25.0 * first["image"], rtol=1e-4)
        assert torch.equal(losses["reconstruction"], first["reconstruction"])
    saved = world.state_dict()
    other = make_world(scale=2.0)
    other.load_state_dict(saved)
    assert torch.allclose(other.losses(post, batch)["image"], losses["image"], rtol=1e-4)
    del saved["senses.images.share"]  # of before there was one
    make_world().load_state_dict(saved)
    with pytest.raises(ValueError, match="ease_end must be at least 501"):
        ImageConfig(ease_end=500)


def test_the_latents_know_the_image():
    """Two images, told apart by nothing else: after some training the decoded ones differ as they do."""
    world = make_world()
    batch = make_batch(8, 2)
    dark = torch.arange(8) % 2 == 0
    batch.obs["camera"][dark], batch.obs["camera"][~dark] = 0, 255
    batch.obs["joints"][:] = 0.0
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(60):
        loss, post, _ = world.loss(batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
    shown = world.decode(post.states)["camera"].mean((1, 2, 3, 4))
    assert shown[dark].max() < 0.3
    assert shown[~dark].min() > 0.7


def test_without_a_decoder_latents_learn_to_name_the_embedding():
    world, batch = make_world(objective="redundancy"), make_batch(8, 4)
    assert world.decode(world.observe_sequence(batch).states).keys() == {"joints"}
    history = []
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(40):
        torch.manual_seed(5)
        loss, _, metrics = world.loss(batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(metrics["world/redundancy_loss"]))
    assert history[-1] < 0.9 * history[0]


def test_redundancy_is_zero_for_what_is_right_and_independent():
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    assert float(redundancy_loss(3.0 * x + 2.0, x, 1.0)[0]) == pytest.approx(0.0, abs=1e-4)
    assert float(redundancy_loss(-x, x, 1.0)[0]) == pytest.approx(8.0, rel=1e-2)  # both wrong: 2 * (1 + 1)^2
    same = x[:, :1].expand(4, 2)  # both numbers say the same: C = 1 everywhere
    assert float(redundancy_loss(same, same, 0.5)[0]) == pytest.approx(0.5 * 2, rel=1e-2)


def test_impossible_images_are_refused():
    for wrong in ((30, 32, 3), (32, 32, 2), (8, 16, 3)):
        with pytest.raises(ValueError, match="camera"):
            WorldModel(make_world().cfg, {"camera": wrong}, 2)
    with pytest.raises(ValueError, match="odd"):
        ImageConfig(kernel=4)
    cfg = dataclasses.replace(make_world().cfg, image=ImageConfig(depth=2, objective="redundancy"))
    assert WorldModel(cfg, {"camera": SHAPE}, 2).senses.blind
    assert not WorldModel(cfg, {"camera": SHAPE, "joints": 3}, 2).senses.blind


def test_half_precision_is_near_full_precision_and_trains():
    batch = make_batch()
    worlds = {name: make_world(precision=name) for name in ("float32", "bfloat16")}
    losses = {}
    for name, world in worlds.items():
        torch.manual_seed(2)
        loss, _, metrics = world.loss(batch, 2)
        loss.backward()
        losses[name] = float(metrics["world/image_loss"])
        assert world.senses(batch.obs).dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in world.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]
