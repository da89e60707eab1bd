// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {ERC20} from "@openzeppelin/contracts/token/ERC20/ERC20.sol";
import {ERC20Capped} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Capped.sol";
import {ERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/ERC20Permit.sol";

/// @title FLOCK: at most 1e9 tokens of 18 decimals. No owner, no blacklist, no fee on transfer.
contract FlockToken is ERC20, ERC20Permit, ERC20Capped {
    uint256 public constant CAP = 1e9 * 1e18;

    /// @param distributor receives the initial supply.
    /// @param initialSupply in wei, at most CAP.
    constructor(address distributor, uint256 initialSupply)
        ERC20("FLOCK", "FLOCK")
        ERC20Permit("FLOCK")
        ERC20Capped(CAP)
    {
        _mint(distributor, initialSupply);
    }

    function _update(address from, address to, uint256 value) internal override(ERC20, ERC20Capped) {
        super._update(from, to, value);
    }
}
