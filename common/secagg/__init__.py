"""Secure aggregation: the coordinator learns the sum of the hospitals' vectors, and no vector."""

from common.secagg.client import ClientSession
from common.secagg.messages import Kind, kind_of
from common.secagg.server import Aggregate, ServerSession
from common.secagg.terms import AggregationPolicy, Attempts, MemoryAttempts, Terms

__all__ = [
    "Aggregate",
    "AggregationPolicy",
    "Attempts",
    "ClientSession",
    "Kind",
    "MemoryAttempts",
    "ServerSession",
    "Terms",
    "kind_of",
]
