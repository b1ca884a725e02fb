"""Federated methods: one file a method, each a NamedTuple of pure functions, listed in one explicit dict."""

from fslora_jax.methods.base import Client, Combined, Method, Payload, Server, whole
from fslora_jax.methods.fedit import fedit
from fslora_jax.methods.fslora import fslora
from fslora_jax.methods.spec import Spec, Traffic, traffic

METHODS = {"fedit": fedit, "fslora": fslora}

__all__ = [
    "METHODS",
    "Client",
    "Combined",
    "Method",
    "Payload",
    "Server",
    "Spec",
    "Traffic",
    "fedit",
    "fslora",
    "traffic",
    "whole",
]
