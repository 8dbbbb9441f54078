"""Private rounds that are broken on purpose, each in one way that checks and audits must notice."""

from dataclasses import replace

import torch

from meta.private import PrivateRounds


class OverTheDrawn(PrivateRounds):
    """Divides by how many took part."""

    def cohort(self, step):
        drawn = super().cohort(step)
        self.expected = max(1, len(drawn))
        return drawn


class NoisyPieces(PrivateRounds):
    """Adds noise to every piece of a cohort."""

    def release(self, shapes, updates):
        pieces = [*updates]
        total = super().release(shapes, pieces)
        for _ in pieces[1:]:
            total["w"] += self.privacy.clip * self.kind.noise * torch.randn(3) / self.expected
        return total


class Shuffled(PrivateRounds):
    """Draws a fixed number of users without replacement."""

    def cohort(self, step):
        super().cohort(step)
        return torch.randperm(self.users, generator=torch.Generator().manual_seed(step))[: self.expected].sort().values


class Unclipped(PrivateRounds):
    """Adds updates up as they are."""

    def release(self, shapes, updates):
        scale = 1e3
        kept = self.privacy, self.kind
        self.privacy, self.kind = (
            replace(self.privacy, clip=self.privacy.clip * scale),
            replace(self.kind, noise=self.kind.noise / scale),
        )
        found = super().release(shapes, updates)
        self.privacy, self.kind = kept
        return found


class Quiet(PrivateRounds):
    """Adds no noise."""

    def release(self, shapes, updates):
        kept, self.kind = self.kind, replace(self.kind, noise=1e-9)
        found = super().release(shapes, updates)
        self.kind = kept
        return found
