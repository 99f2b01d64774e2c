# SPDX-License-Identifier: Apache-2.0
"""`lynx bench e2e`: real servers on a real link, every mode in one run."""
