"""Federated methods: one file a method, each a NamedTuple of pure functions, listed in one explicit dict."""

from fslora_jax.methods.base import TOLD, Client, Combined, Method, Payload, Server, Traits
from fslora_jax.methods.catalogue import METHODS, WRAPPERS, build
from fslora_jax.methods.fedit import fedit
from fslora_jax.methods.fslora import fslora
from fslora_jax.methods.parts import merge, whole
from fslora_jax.methods.spec import Spec, Traffic, traffic

__all__ = [
    "METHODS",
    "TOLD",
    "WRAPPERS",
    "Client",
    "Combined",
    "Method",
    "Payload",
    "Server",
    "Spec",
    "Traffic",
    "Traits",
    "build",
    "fedit",
    "fslora",
    "merge",
    "traffic",
    "whole",
]
