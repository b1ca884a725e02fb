"""Wrappers take a method and return one: what stays with the client, what the network does to uploads, privacy."""
