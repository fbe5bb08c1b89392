# SPDX-License-Identifier: Apache-2.0
"""What happens between frames: decoding, mailbox, preprocessing, temporal filter, stage times."""
