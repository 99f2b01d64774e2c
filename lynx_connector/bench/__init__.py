# SPDX-License-Identifier: Apache-2.0
"""`lynx bench codec`: codecs on real KV tensors; `kernels/` and `e2e/` are benches of their own."""
