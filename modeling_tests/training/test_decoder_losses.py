from types import SimpleNamespace

import torch

from transformers_unicode2.training.decoder_losses import flow_matching_loss


def test_shift_moves_times_towards_noise():
    """`x_t` of an image of zeros is `t noise`. A transformer that gives it back is off by `(1 - t) noise`."""

    def echo(hidden_states, timestep, **_):
        times.append(timestep)
        return SimpleNamespace(sample=hidden_states)

    losses, times = [], []
    for shift in (1.0, 3.0):
        torch.manual_seed(0)
        inputs = torch.zeros(64, 4, 4, 4), torch.zeros(64, 2, 8), torch.zeros(64, 8)
        losses.append(flow_matching_loss(echo, *inputs, shift=shift).item())
    torch.testing.assert_close(times[1], 3 * times[0] / (1 + 2 * times[0]))
    assert losses[1] < losses[0]
