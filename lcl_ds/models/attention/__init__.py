"""Attention that keeps packed documents apart."""
