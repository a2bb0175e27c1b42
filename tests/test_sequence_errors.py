"""What an update says of each sequence, by which the replay may draw."""

import torch
from test_dreamer import learn, make, make_batch

from agent.learning.actor_critic import lambda_return
from agent.learning.sequence_errors import sequence_errors


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


def test_rows_that_have_nothing_to_learn_do_not_count():
    """Nothing predicts the first observation of an episode, and no loss trains the value at its end."""
    kl = torch.tensor([[9.0, 1.0, 3.0], [1.0, 2.0, 3.0]])
    first = torch.tensor([[True, False, False], [False, False, False]])
    wrong, ended = torch.tensor([[4.0, 50.0], [7.0, 8.0]]), torch.tensor([[False, True], [True, True]])
    assert sequence_errors(kl, first, wrong, ended).tolist() == [[2.0, 4.0], [2.0, 0.0]]
    assert sequence_errors(kl, first).tolist() == [[2.0, 0.0], [2.0, 0.0]]


def test_the_critic_is_wrong_where_its_value_is_not_the_return(monkeypatch):
    agent, known = make(starts=8), []

    def remembered(rewards, continues, values, gamma):
        known.append((values, lambda_return(rewards, continues, values, gamma)))
        return known[-1][1]

    monkeypatch.setattr("agent.learning.dreamer.lambda_return", remembered)
    with torch.no_grad():
        agent.behavior.critic.net.out.weight.normal_()
    errors = learn(agent, make_batch()).errors[:, 1]
    ((values, returns),) = known
    wrong = (values[:, 0] - returns[:, 0]).abs().view(len(errors), -1)
    assert (errors > 0).all()
    assert torch.allclose(errors, wrong.mean(1).detach())
