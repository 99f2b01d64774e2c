# SPDX-License-Identifier: Apache-2.0
"""Which prefills a decode instance may connect to: whatever its clients name, no others."""

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from lynx_connector.errors import NotAllowedError, shown


class AllowedPrefills:
    """The hosts and networks of `allowed_prefills`; none: every host is allowed.

    Names are compared as they are written and never looked up, so that a client cannot make this
    instance ask a name server.
    """

    def __init__(self, entries: tuple[str, ...] = ()):
        self._networks = []
        self._names = set()
        for entry in entries:
            try:
                self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self._names.add(_bare(entry))

    def check(self, host: str, key: str = "remote_host") -> None:
        """Refuse a host that is not allowed. key: where it was named.

        Raises:
            NotAllowedError: naming it.
        """
        if not self._networks and not self._names:
            return
        bare = _bare(host)
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            allowed = bare in self._names
        else:
            address = getattr(address, "ipv4_mapped", None) or address
            allowed = any(address in network for network in self._networks)
        if not allowed:
            raise NotAllowedError(
                f"{key} {shown(host)} is not among allowed_prefills of this instance"
            )

    def check_params(self, params: dict[str, Any]) -> None:
        """The same for whatever a decode leg's `kv_transfer_params` name.

        Raises:
            NotAllowedError: naming the host.
        """
        if isinstance(host := params.get("remote_host"), str):
            self.check(host)
        if isinstance(url := params.get("remote_bootstrap_addr"), str):
            self.check_url(url)

    def check_url(self, url: str) -> None:
        """The same for the bootstrap server of a decode leg in Mooncake's shape.

        Raises:
            NotAllowedError: naming its host.
        """
        try:
            host = urlsplit(url).hostname or ""
        except ValueError:
            host = url
        self.check(host, "remote_bootstrap_addr")


def _bare(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
