"""An exact budget: independent gates under the condition that at most k of them are on.

Shapes: B observations, P pathways.
"""

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor
from torch.nn.functional import softplus


class AtMost(Distribution):
    """Bernoulli gates conditioned on no more than ``budget`` of them being on.

    ``p(mask) = exp(sum of the active logits) / Z``, with Z summed over the masks within the budget. Its mode is the projection
    that keeps the ``budget`` best-scored pathways among those with a logit above zero, so that training samples from what
    use takes the best of, and log-probabilities are exact. Z is found by dynamic programming over pathways, as for the
    conditional Bernoulli distribution (Chen and Liu 1997, "Statistical applications of the Poisson-binomial and conditional
    Bernoulli distributions").

    Args:
        pathways: P.
        budget: k, 0 to P.
    """

    def __init__(self, pathways: int, budget: int) -> None:
        super().__init__()
        if int(budget) != budget or not 0 <= budget <= pathways:
            raise ValueError(f"max_active must be a whole number from 0 to {pathways}, the number of pathways; got {budget}.")
        self.pathways, self.budget = pathways, int(budget)

    def proba_distribution_net(self, *args: object, **kwargs: object) -> torch.nn.Module:
        """The logits are the scorer's own."""
        return torch.nn.Identity()

    def proba_distribution(self, logits: Tensor) -> "AtMost":  # type: ignore[override]
        """Set the logits ``[B, P]``."""
        self.logits = logits
        # rest[p][:, j]: log of the weight of all ways to set the pathways from p on with at most j of them on.
        rest = [logits.new_zeros(len(logits), self.budget + 1)]
        for p in reversed(range(self.pathways)):
            on = logits[:, p, None] + rest[0][:, :-1]
            without = rest[0][:, 1:]
            more = without + softplus(on - without)  # logaddexp, whose second derivative overflows
            rest.insert(0, torch.cat([rest[0][:, :1], more], 1))
        self._rest = rest
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """``[B]``; minus infinity above the budget."""
        found = (actions * self.logits).sum(1) - self._rest[0][:, -1]
        return found.masked_fill(actions.sum(1) > self.budget, -torch.inf)

    def entropy(self) -> Tensor:
        """``[B]``: log Z minus the expected sum of active logits; the marginals are Z's own derivative."""
        total = self._rest[0][:, -1]
        if not total.requires_grad:
            with torch.enable_grad():
                leaf = self.logits.detach().requires_grad_()
                return AtMost(self.pathways, self.budget).proba_distribution(leaf).entropy().detach()
        (marginals,) = torch.autograd.grad(total.sum(), self.logits, create_graph=True)
        return total - (marginals * self.logits).sum(1)

    def sample(self) -> Tensor:
        """Masks ``[B, P]``, one pathway after the other."""
        left = torch.full((len(self.logits), 1), self.budget, device=self.logits.device)
        bits = []
        for p in range(self.pathways):
            after = self._rest[p + 1].gather(1, (left - 1).clamp_min(0))
            log_on = self.logits[:, p, None] + after - self._rest[p].gather(1, left)
            bit = (torch.rand_like(log_on) < log_on.exp()) & (left > 0)
            left = left - bit.long()
            bits.append(bit)
        return torch.cat(bits, 1).float()

    def mode(self) -> Tensor:
        """The most probable masks ``[B, P]``: of the logits above zero the ``budget`` largest; of equal ones the earlier."""
        order = self.logits.argsort(dim=1, descending=True, stable=True)
        best = torch.zeros_like(self.logits).scatter(1, order[:, : self.budget], 1.0)
        return best * (self.logits > 0)

    def actions_from_params(self, logits: Tensor, deterministic: bool = False) -> Tensor:  # type: ignore[override]
        """Masks ``[B, P]`` for logits ``[B, P]``."""
        return self.proba_distribution(logits).get_actions(deterministic)

    def log_prob_from_params(self, logits: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Sampled masks ``[B, P]`` and their log-probabilities ``[B]``."""
        actions = self.actions_from_params(logits)
        return actions, self.log_prob(actions)
