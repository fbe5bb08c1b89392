# SPDX-License-Identifier: Apache-2.0
"""Surgical video: label sets, frame sources and the phantom patient."""
