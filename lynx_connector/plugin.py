# SPDX-License-Identifier: Apache-2.0
"""The `vllm.general_plugins` entry point: makes the name `LynxConnector` known to vLLM.

vLLM calls it in the front end, the engine core and every worker, more than once per process.
"""


def register() -> None:
    """Register `LynxConnector` with vLLM's connector factory (idempotent).

    Source: vllm/distributed/kv_transfer/kv_connector/factory.py.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if "LynxConnector" not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            "LynxConnector", "lynx_connector.connector", "LynxConnector"
        )
