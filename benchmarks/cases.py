"""The operators' cases: sizes, inputs, peers, least work, and the check against float64."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import normalize

import baselines
from baselines import Peer
from medmoco.ops.queue_info_nce import queue_info_nce_reference
from medmoco.ops.zca_whiten import zca_whiten_reference
from operation import (
    Errors,
    Inputs,
    Operation,
    Outcome,
    Size,
    gradient_error,
    largest,
    relative_errors,
    run_pass,
    spread,
)

CHECKED_LOGITS = 2**22  # in float64 at a time: a check takes rows that stand for all


class QueueInfoNCE(Operation):
    name = "queue_info_nce"
    dims = ("N", "K", "C")
    optional = ("ids",)
    sizes = (
        {"N": 256, "K": 65536, "C": 128},
        {"N": 256, "K": 65536, "C": 128, "ids": 1},
    )
    large_sizes = ({"N": 1568, "K": 65536, "C": 128},)
    cuda_large_sizes = (
        {"N": 12544, "K": 65536, "C": 128},
        {"N": 100352, "K": 65536, "C": 128},
    )
    quick_sizes = ({"N": 32, "K": 1024, "C": 64}, {"N": 32, "K": 1024, "C": 64, "ids": 1})
    temperature = 0.2
    # Of the loss, and of the gradient relative to its largest entry, measured against float64 at
    # this temperature, K=65536, C=128. CPU kernels widen 16-bit operands.
    measured: Mapping[torch.dtype, Errors] = {
        torch.float32: {"value": 1.7e-6, "gradient": 1e-7},
        torch.float16: {"value": 1.7e-5, "gradient": 1.2e-5},
        torch.bfloat16: {"value": 1.4e-4, "gradient": 8.3e-5},
    }

    def complaint(self, size: Size) -> str | None:
        if size.get("ids", 1) != 1:
            return f"ids=1 is for a case with ids, got ids={size['ids']}"
        return super().complaint(size)

    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def rows(count: int) -> Tensor:
            return torch.randn(count, size["C"], generator=generator, device=device)

        query = rows(size["N"])
        near = query + rows(size["N"])  # a positive that a trained encoder would give
        query, key, queue = (normalize(t).to(dtype) for t in (query, near, rows(size["K"])))
        ids: tuple[Tensor, ...] = ()
        if size.get("ids"):
            volumes = max(2, size["K"] // 64)
            ids = tuple(
                torch.randint(volumes, (count,), generator=generator, device=device)
                for count in (size["N"], size["K"])
            )
        operands = (query.requires_grad_(), key, queue, self.temperature, *ids)
        return Inputs(operands, torch.ones(size["N"], device=device))

    def peers(
        self, size: Size, dtype: torch.dtype, device: torch.device, *, quick: bool
    ) -> list[Peer]:
        with_ids = bool(size.get("ids"))
        return baselines.info_nce_peers(
            size["N"], size["K"], dtype, device, with_ids=with_ids, quick=quick
        )

    def flop(self, size: Size, *, backward: bool) -> float:
        return (4 if backward else 2) * size["N"] * size["K"] * size["C"]

    def exponentials(self, size: Size) -> float:
        return size["N"] * size["K"]

    def checker(self, inputs: Inputs, *, backward: bool) -> Callable[[Outcome], Errors]:
        query, key, queue, temperature, *ids = inputs.operands
        rows = spread(len(query), CHECKED_LOGITS // len(queue), query.device)
        wide = Inputs(
            (
                query.detach()[rows].double().requires_grad_(),
                key[rows].double(),
                queue.double(),
                temperature,
                *(part for pair in [ids] if pair for part in (pair[0][rows], pair[1])),
            ),
            torch.ones(len(rows), dtype=torch.float64, device=query.device),
        )
        truth = run_pass(queue_info_nce_reference, wide, backward=backward)

        def errors(found: Outcome) -> Errors:
            value = largest(found.values[0][rows] - truth.values[0])
            for rank in found.values[1:]:  # which of the peers only medmoco gives
                if largest(rank[rows] - truth.values[1]) > 1:  # more than a near tie
                    value = math.inf
            return {"value": value} | gradient_error(found, truth, rows)

        return errors

    def allowed(
        self, outcome: Outcome, eager: Errors, dtype: torch.dtype, device: torch.device
    ) -> Errors:
        measured = self.measured[torch.float32 if device.type == "cpu" else dtype]
        errors = {name: 3 * measured[name] for name in eager}
        if outcome.gradient is not None and dtype != torch.float32:
            errors["gradient"] += torch.finfo(dtype).eps  # it is rounded to
        return errors


class DenseMatch(Operation):
    name = "dense_match"
    dims = ("B", "C", "S")
    sizes = ({"B": 8, "C": 256, "S": 784}, {"B": 8, "C": 256, "S": 3136})
    # The last map of ResNet-50, and one of 56 x 56.
    cuda_sizes = ({"B": 256, "C": 2048, "S": 49}, {"B": 64, "C": 256, "S": 3136})
    quick_sizes = ({"B": 2, "C": 32, "S": 100},)
    differentiable = False

    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (size["B"], size["C"], size["S"])
        query_map, key_map = torch.randn(2, *shape, generator=generator, device=device).to(dtype)
        return Inputs((query_map, key_map), None)

    def peers(
        self, size: Size, dtype: torch.dtype, device: torch.device, *, quick: bool
    ) -> list[Peer]:
        return baselines.match_peers(quick=quick)

    def flop(self, size: Size, *, backward: bool) -> float:
        return 2 * size["B"] * size["C"] * size["S"] ** 2

    def checker(self, inputs: Inputs, *, backward: bool) -> Callable[[Outcome], Errors]:
        """The cosine at the index, not the index itself, which rounding may change at near ties."""
        query_map, key_map = (normalize(t.double(), dim=1) for t in inputs.operands)
        batch, _, positions = query_map.shape
        rows = spread(positions, CHECKED_LOGITS // (batch * positions), query_map.device)
        cosine = query_map[:, :, rows].mT @ key_map
        best = cosine.amax(2)

        def errors(found: Outcome) -> Errors:
            index, similarity = (value[:, rows] for value in found.values)
            chosen = cosine.gather(2, index[:, :, None]).squeeze(2)
            return {"value": max(largest(best - chosen), largest(best - similarity))}

        return errors

    def allowed(
        self, outcome: Outcome, eager: Errors, dtype: torch.dtype, device: torch.device
    ) -> Errors:
        return {"value": 2 * eager["value"] + 4 * torch.finfo(outcome.values[1].dtype).eps}


class CovarianceLoss(Operation):
    name = "covariance_loss"
    dims = ("N", "D")
    sizes = ({"N": 256, "D": 2048}, {"N": 12544, "D": 512})
    large_sizes = ({"N": 256, "D": 8192},)
    cuda_sizes = ({"N": 256, "D": 2048},)
    cuda_large_sizes = ({"N": 256, "D": 8192}, {"N": 12544, "D": 2048})
    quick_sizes = ({"N": 32, "D": 128}, {"N": 256, "D": 64})

    def complaint(self, size: Size) -> str | None:
        least = "expected at least 2 samples, got N=1" if size["N"] == 1 else None
        return super().complaint(size) or least

    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        features = torch.randn(size["N"], size["D"], generator=generator, device=device)
        return Inputs((features.to(dtype).requires_grad_(),), torch.ones((), device=device))

    def peers(
        self, size: Size, dtype: torch.dtype, device: torch.device, *, quick: bool
    ) -> list[Peer]:
        return baselines.covariance_peers(size["N"], size["D"], quick=quick)

    def flop(self, size: Size, *, backward: bool) -> float:
        """Half of the smaller symmetric product, then its product with the features."""
        less, more = sorted(size.values())
        return (3 if backward else 1) * less * less * more

    def checker(self, inputs: Inputs, *, backward: bool) -> Callable[[Outcome], Errors]:
        """The cheaper form: float64 has the digits that the Gram form's subtraction costs."""
        features = inputs.operands[0].detach().double().requires_grad_()
        gram = features.shape[0] < features.shape[1]
        function = baselines.covariance_gram if gram else baselines.covariance_eager
        cotangent = torch.ones((), dtype=torch.float64, device=features.device)
        truth = run_pass(function, Inputs((features,), cotangent), backward=backward)
        return lambda found: relative_errors(found, truth)


class ZcaWhiten(Operation):
    name = "zca_whiten"
    dims = ("N", "D", "group")
    sizes = ({"N": 256, "D": 2048, "group": 64},)
    quick_sizes = ({"N": 64, "D": 64, "group": 16},)
    eps = 1e-3

    def complaint(self, size: Size) -> str | None:
        divides = size["group"] > 0 and size["D"] % size["group"] == 0
        uneven = f"group must divide D, got D={size['D']} and group={size['group']}"
        return super().complaint(size) or (None if divides else uneven)

    def inputs(self, size: Size, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        shape = (size["N"], size["D"])
        features, cotangent = torch.randn(2, *shape, generator=generator, device=device).to(dtype)
        return Inputs((features.requires_grad_(), size["group"], self.eps), cotangent)

    def peers(
        self, size: Size, dtype: torch.dtype, device: torch.device, *, quick: bool
    ) -> list[Peer]:
        return baselines.whiten_peers(quick=quick)

    def flop(self, size: Size, *, backward: bool) -> float:
        """Covariance (half, as symmetric) and whitening, and in the backward pass three products;
        the eigendecomposition is left out."""
        return (9 if backward else 3) * size["N"] * size["D"] * size["group"]

    def checker(self, inputs: Inputs, *, backward: bool) -> Callable[[Outcome], Errors]:
        features, group, eps = inputs.operands
        assert inputs.cotangent is not None
        wide = Inputs(
            (features.detach().double().requires_grad_(), group, eps), inputs.cotangent.double()
        )
        truth = run_pass(zca_whiten_reference, wide, backward=backward)
        return lambda found: relative_errors(found, truth)


OPERATIONS = {
    operation.name: operation
    for operation in (QueueInfoNCE(), DenseMatch(), CovarianceLoss(), ZcaWhiten())
}
