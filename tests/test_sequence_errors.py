"""What an update says of each sequence, by which the replay may draw."""

import torch
from test_dreamer import learn, make, make_batch


def test_an_update_says_how_wrong_each_sequence_was():
    """Twice the same sequence and a third that the model cannot know: its errors alone differ."""
    agent = make(starts=8)
    batch = make_batch()
    same = batch.map(lambda leaf: torch.cat([leaf[:1], leaf[:1], leaf[1:2]]))
    size = torch.tensor([1.0, 1.0, 50.0])[:, None, None]
    update = learn(agent, same._replace(obs={name: size * x for name, x in same.obs.items()}))
    assert update.errors.shape == (3, 2)
    assert not update.errors.requires_grad
    model = update.errors[:, 0]
    assert float((model[0] - model[1]).abs()) < float((model[0] - model[2]).abs())
    assert (update.errors[:, 1] >= 0).all()
