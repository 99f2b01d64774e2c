# SPDX-License-Identifier: Apache-2.0
"""`lynx bench codec`: codecs measured on real KV tensors of a model folder."""
