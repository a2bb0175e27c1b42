"""Images in the world model: shapes, losses, and that they teach what they show."""

import pytest
import torch
from small import observe, world_loss

from world_model import Batch, LoopConfig, ModelConfig, WorldModel
from world_model import model as model_module
from world_model.images import (
    ANNEAL_BEGIN,
    ANNEAL_END,
    ChannelNorm,
    ConvDecoder,
    ConvEncoder,
    ImageConfig,
)

SHAPE = (32, 48, 3)


def make_world(precision: str = "float32", **image) -> WorldModel:
    torch.manual_seed(0)
    loop = LoopConfig(tokens=2, width=8, units=16)
    cfg = ModelConfig(loop=loop, image=ImageConfig(**{"base_channels": 2} | image), groups=3, classes=4, units=16)
    world = WorldModel(cfg, {"camera": SHAPE, "joints": 3}, 2)
    world.observation_model.images.precision = precision
    return world


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


@pytest.mark.parametrize("downsample", ["patch", "stride"])
def test_encoder_and_decoder_keep_to_their_shapes(downsample):
    cfg = ImageConfig(base_channels=2, downsample=downsample)
    images = torch.randint(256, (5, *SHAPE), dtype=torch.uint8)
    assert ConvEncoder(SHAPE, cfg, 7)(images).shape == (5, 7)
    out = ConvDecoder(SHAPE, cfg, 6)(torch.randn(5, 6))
    assert out.shape == (5, *SHAPE)
    assert -0.5 < out.min() < out.max() < 1.5


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


@pytest.mark.parametrize("downsample", ["patch", "stride"])
def test_a_decoder_learns_an_image(downsample):
    torch.manual_seed(0)
    decoder, feat = ConvDecoder((16, 16, 1), ImageConfig(base_channels=4, downsample=downsample), 2), torch.eye(2)
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
            embed = encoder(images)
        return float((embed - embed.mean(0)).square().mean() / embed.square().mean())

    before = variety()
    encoder.normaliser.fit(images)
    assert before < 0.05
    assert variety() > 5 * before
    torch.testing.assert_close(encoder(images[:1]), encoder(images)[:1], atol=1e-5, rtol=1e-5)
    encoder.normaliser.fit(images[:1].repeat(3, 1, 1, 1))  # all alike: nothing is divided by nothing
    assert torch.isfinite(encoder(images)).all()


def test_latents_of_images_begin_with_information(monkeypatch):
    """The posterior's entropy over that of the uniform distribution, before anything is learned."""
    batch, share = make_batch(), {}
    for first in (1.0, 4.0):
        monkeypatch.setattr(model_module, "FIRST_LOGITS", first)
        world = make_world()
        world.observation_model.fit_normaliser(batch.obs)
        logp = observe(world, batch).post_dist.detach()
        entropy = -(logp.exp() * logp).sum((-2, -1)).mean()
        share[first] = float(entropy / (logp.shape[-2] * torch.tensor(logp.shape[-1]).log()))
    assert share[4.0] < 0.7 < share[1.0]


@pytest.mark.parametrize(("spread", "weight"), [(0.4, 0.25), (0.1, 4.0), (0.02, 25.0)])
def test_a_decoder_says_how_images_differ_from_the_usual_one_and_small_differences_weigh_more(spread, weight):
    torch.manual_seed(0)
    world, batch = make_world(), make_batch()
    usual = torch.full(SHAPE, 128)
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None, None]
    batch.obs["camera"][:] = (usual + 255 * spread * sign).round().to(torch.uint8)
    images = world.observation_model.images
    images.fit_normaliser(batch.obs)
    decoder = images.decoders["camera"]
    assert float(decoder.normaliser.weight) == pytest.approx(weight, rel=0.05)
    feat = observe(world, batch).states.feat()
    shown = images.reconstruct(feat)["camera"]
    with torch.no_grad():
        decoder.stages[-2 if isinstance(decoder.stages[-1], torch.nn.PixelShuffle) else -1].weight.zero_()
    nothing = images.reconstruct(feat)["camera"]
    assert torch.allclose(nothing, usual / 255.0, atol=0.01)  # who says nothing says: as usual
    assert 0.05 * spread < float((shown - nothing).detach().std()) < 2 * spread  # and speaks in that size
    loss = images.losses(feat, batch.obs)["image"]
    expected = float(decoder.normaliser.weight) * spread**2 * usual.numel()
    assert torch.allclose(loss, torch.full_like(loss, expected), rtol=0.1)


def test_errors_are_judged_in_float32_whatever_the_features_are():
    world, batch = make_world(precision="bfloat16"), make_batch()
    feat = observe(world, batch).states.feat().detach()
    images = world.observation_model.images
    half = feat.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, shown = images.losses(half, batch.obs)["image"], images.reconstruct(half)["camera"]
    wrong = (shown - batch.obs["camera"] / 255.0).square().sum((2, 3, 4))
    assert torch.allclose(loss, images.decoders["camera"].normaliser.weight * wrong, rtol=1e-6)


def test_losses_and_predictions_of_images_and_vectors_side_by_side():
    world, batch = make_world(), make_batch()
    post = observe(world, batch)
    losses = world.losses(post, batch)
    guess = world.decode(post.states)
    assert guess["camera"].shape == (3, 4, *SHAPE)
    assert guess["joints"].shape == (3, 4, 3)
    wrong = guess["camera"] - batch.obs["camera"] / 255.0
    assert torch.allclose(losses["image"], wrong.square().sum((2, 3, 4)), rtol=1e-4)
    assert {"image", "reconstruction"} <= losses.keys()
    numbers = world.observation_model.targets(batch.obs), world.observation_model.predictions(post.states.feat())
    assert [x.shape for x in numbers] == [(3, 4, 3 + 32 * 48 * 3)] * 2
    assert torch.allclose(numbers[1][..., 3:], guess["camera"].flatten(2))


def test_images_lose_their_additional_weight_once_they_are_learned():
    world, batch = make_world(anneal=True), make_batch()
    batch.obs["camera"] //= 32
    world.observation_model.fit_normaliser(batch.obs)
    assert world.observation_model.images.decoders["camera"].normaliser.weight == 25.0
    post = observe(world, batch)
    first = world.losses(post, batch)
    middle = (ANNEAL_BEGIN + ANNEAL_END) // 2
    for updates, weight in ((ANNEAL_BEGIN, 25.0), (middle, 5.0), (ANNEAL_END, 1.0), (10 * ANNEAL_END, 1.0)):
        world.observation_model.anneal(updates)
        losses = world.losses(post, batch)
        assert torch.allclose(losses["image"], weight / 25.0 * first["image"], rtol=1e-4)
        assert torch.equal(losses["reconstruction"], first["reconstruction"])
    saved = world.state_dict()
    other = make_world()
    other.load_state_dict(saved)
    assert torch.allclose(other.losses(post, batch)["image"], losses["image"], rtol=1e-4)


def test_the_latents_know_the_image():
    """Two images, told apart by nothing else: after some training the decoded ones differ as they do."""
    world = make_world()
    batch = make_batch(8, 2)
    dark = torch.arange(8) % 2 == 0
    batch.obs["camera"][dark], batch.obs["camera"][~dark] = 0, 255
    batch.obs["joints"][:] = 0.0
    adam = torch.optim.Adam(world.parameters(), 3e-3)
    for _ in range(60):
        loss, post, _ = world_loss(world, batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
    shown = world.decode(post.states)["camera"].mean((1, 2, 3, 4))
    assert shown[dark].max() < 0.3
    assert shown[~dark].min() > 0.7


def test_impossible_images_are_refused():
    for wrong in ((30, 32, 3), (32, 32, 2), (8, 16, 3)):
        with pytest.raises(ValueError, match="camera"):
            WorldModel(make_world().cfg, {"camera": wrong}, 2)


def test_half_precision_is_near_full_precision_and_trains():
    batch = make_batch()
    worlds = {name: make_world(precision=name) for name in ("float32", "bfloat16")}
    losses = {}
    for name, world in worlds.items():
        torch.manual_seed(2)
        loss, _, metrics = world_loss(world, batch, 2)
        loss.backward()
        losses[name] = float(metrics["world/image_loss"])
        assert world.observation_model(batch.obs).dtype == torch.float32
        assert all(p.grad is None or p.grad.isfinite().all() for p in world.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=2e-2)
    assert losses["bfloat16"] != losses["float32"]
