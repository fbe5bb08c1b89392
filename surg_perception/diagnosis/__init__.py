# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a running pipeline: what was seen of it (`snapshot`), and what follows (`findings`)."""
