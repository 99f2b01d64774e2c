# SPDX-License-Identifier: Apache-2.0
"""`lynx bench kernels`: what encoding and decoding cost, against a plain copy of the same KV."""
