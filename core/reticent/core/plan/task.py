"""What is learned: data, models and how many clients share them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ..section import Count, Positive, Section


class Partition(Section):
    """How private examples are dealt to clients.

    Attributes:
        kind: ``iid``, ``dirichlet`` (label proportions of each client from Dirichlet(alpha); Hsu et
            al. 2019), ``shards`` (each client holds ``labels_per_client`` labels; McMahan et al.
            2017) or ``natural`` (a client is a person, in tasks whose data belong to people).
        alpha: Concentration of the Dirichlet distribution; smaller is more skewed.
        labels_per_client: Number of label shards a client holds, for ``shards``.
        examples_per_client: When given, every client draws this many examples of its own from the
            pool, so that populations larger than the data can be simulated (clients then overlap).
            When absent, the pool is split into disjoint parts.
    """

    kind: Literal["iid", "dirichlet", "shards", "natural"] = "iid"
    alpha: Positive = 0.5
    labels_per_client: Count = 2
    examples_per_client: Count | None = None

    @model_validator(mode="after")
    def _natural_is_what_it_is(self) -> Self:
        if self.kind == "natural" and self.examples_per_client is not None:
            raise ValueError(
                f"examples_per_client={self.examples_per_client}: leave it out when kind is "
                '"natural", where a client holds what its people have; or use kind="iid"'
            )
        return self


class TaskSection(Section):
    """Which data and models, and how many clients share them.

    Attributes:
        public_labels: How many public examples, the first ones, keep their labels; the others get
            the labels that the teacher, which learns from those, gives them. When absent, all keep
            theirs.
    """

    name: str = "fashion"
    clients: Count = 100
    public_examples: Count = 1000
    public_labels: Count | None = None
    partition: Partition = Partition()
