# SPDX-License-Identifier: Apache-2.0
"""SurgLLM: questions about the last seconds of endoscope video, answered by a language model that sees them."""
