"""Workloads of network inputs and task embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...inputs import normalized_embedding, normalized_embedding_backward, pack_inputs
from .case import Case


def cases() -> Iterator[Case]:
    """Critic and actor inputs of one task and of many, padded for products in bfloat16 or as they are."""
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    for observation, action, embedding, tasks, width, updates, norm, table_dtype, given, dtype in (
        (223, 38, 32, 4, 296, 1, "l2", fp32, fp32, bf16),  # the dogs
        (39, 4, 32, 50, 80, 1, "l2", fp32, fp32, bf16),  # MetaWorld
        (39, 4, 32, 50, 80, 64, "l2", fp32, fp32, bf16),  # and with so many rows that tasks take chunks
        (64, 0, 32, 50, 96, 1, "l2", bf16, bf16, bf16),  # an actor's, aligned
        (67, 24, 0, 0, 91, 1, "l2", fp32, fp32, fp32),  # one task
        (39, 4, 32, 50, 75, 1, "l1", fp32, fp32, fp32),
        (39, 4, 256, 7, 299, 1, "l2", fp32, fp32, fp32),
        (5, 3, 8, 7, 16, 1, "l1", fp64, fp64, fp64),
        (2000, 100, 0, 0, 4096, 1, "l2", fp32, fp32, bf16),  # parts wider than a block
    ):

        def prepare(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: tuple[int, ...] = (observation, action, embedding, tasks, width, updates),
            norm: str = norm,
            dtypes: tuple[torch.dtype, ...] = (given, table_dtype, dtype),
        ) -> Callable[[], object]:
            observation, action, embedding, tasks, width, updates = sizes
            rows = batch * updates
            observations = torch.randn(rows, observation, device=device).to(dtypes[0])
            actions = table = ids = None
            if action:
                actions = torch.randn(rows, action, device=device).to(dtypes[0]).requires_grad_()
            if tasks:
                table = torch.randn(tasks, embedding, device=device).to(dtypes[1]).requires_grad_()
                ids = torch.randint(tasks, (rows,), device=device)
            leaves = [x for x in (actions, table) if x is not None]
            seed = torch.randn(rows, width, device=device).to(dtypes[2])

            def call() -> object:
                out = pack_inputs(
                    observations, actions, table, ids, norm, width=width, dtype=dtypes[2], impl=impl
                )
                return out, *torch.autograd.grad(out, leaves, seed)

            return call

        def moved(
            batch: int,
            updates: int = updates,
            read: int = (observation + action) * given.itemsize + (8 if tasks else 0),
            written: int = width * dtype.itemsize,
            gradient: int = embedding * dtype.itemsize + action * given.itemsize * (given != dtype) * 2,
        ) -> int:
            return batch * updates * (read + written + gradient)

        label = f"O={observation} A={action} D={embedding} T={tasks} W={width} rows x{updates} {norm} "
        label += " ".join(str(kind).removeprefix("torch.") for kind in (given, table_dtype, dtype))
        yield Case("pack_inputs", label, prepare, moved, ("pack_inputs", "embedding_backward"))

    for observation, action, embedding, tasks, width, table_dtype, dtype in (
        (39, 4, 32, 50, 80, fp32, bf16),  # MetaWorld
        (223, 38, 32, 4, 293, fp32, fp32),  # the dogs
        (5, 3, 8, 7, 16, fp64, fp64),
    ):

        def pack(
            device: torch.device,
            batch: int,
            impl: str,
            sizes: tuple[int, ...] = (observation, action, embedding, tasks, width),
            dtypes: tuple[torch.dtype, ...] = (table_dtype, dtype),
        ) -> Callable[[], object]:
            observation, action, embedding, tasks, width = sizes
            observations, actions = (
                torch.randn(batch, n, device=device).to(dtypes[0]) for n in (observation, action)
            )
            table = torch.randn(tasks, embedding, device=device).to(dtypes[0])
            ids = torch.randint(tasks, (batch,), device=device)
            out = torch.zeros(batch, width, device=device, dtype=dtypes[1])
            return lambda: pack_inputs(observations, actions, table, ids, out=out, impl=impl)

        def back(
            device: torch.device,
            batch: int,
            impl: str,
            flat: bool,
            sizes: tuple[int, ...] = (observation, action, embedding, tasks, width),
            dtypes: tuple[torch.dtype, ...] = (table_dtype, dtype),
        ) -> Callable[[], object]:
            observation, action, embedding, tasks, width = sizes
            table = torch.randn(tasks, embedding, device=device).to(dtypes[0])
            ids = torch.randint(tasks, (batch,), device=device)
            first = observation + action
            networks = (2,) if flat else ()
            seed = torch.randn(*networks, batch, width, device=device).to(dtypes[1])
            seed = seed[..., first : first + embedding]
            out = torch.zeros_like(table, dtype=dtypes[1]) if flat else None
            return lambda: normalized_embedding_backward(seed, table, ids, out=out, impl=impl)

        def packed(
            batch: int,
            each: int = (observation + action) * table_dtype.itemsize + 8 + width * dtype.itemsize,
        ) -> int:
            return batch * each

        kinds = " ".join(str(kind).removeprefix("torch.") for kind in (table_dtype, dtype))
        for flat in (False, True):
            told = f"D={embedding} T={tasks} {kinds}{' of 2 networks into a buffer' if flat else ''}"
            prepare_back = partial(back, flat=flat)

            def summed(batch: int, each: int = (1 + flat) * embedding * dtype.itemsize + 8) -> int:
                return batch * each

            yield Case("normalized_embedding_backward", told, prepare_back, summed, ("embedding_backward",))
        told = f"O={observation} A={action} D={embedding} T={tasks} W={width} {kinds} into a buffer"
        yield Case("pack_inputs", told, pack, packed, ("pack_inputs",))

    def embed(device: torch.device, batch: int, impl: str) -> Callable[[], object]:
        table = torch.randn(50, 32, device=device).requires_grad_()
        ids, seed = torch.randint(50, (batch,), device=device), torch.randn(batch, 32, device=device)

        def call() -> object:
            out = normalized_embedding(table, ids, impl=impl)
            return out, *torch.autograd.grad(out, table, seed)

        return call

    kernels = ("pack_inputs", "embedding_backward")
    yield Case("normalized_embedding", "T=50 D=32 float32", embed, lambda batch: batch * 264, kernels)
