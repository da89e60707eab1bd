// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";

/// @title How much gas a pairing may burn on a malformed point.
/// @notice The owner can follow a repricing of the precompile, and nothing else: too little would stop anchors, so
/// the setter refuses less than today's price, and it can never make a false signature pass.
abstract contract PairingGas is Ownable2Step {
    /// @notice Price of a pairing of two pairs by EIP-2537: 37,700 + 2 * 32,600.
    uint256 public constant PAIRING_GAS_FLOOR = 102_900;

    uint256 public pairingGas;

    event PairingGasSet(uint256 pairingGas);

    error PairingGasTooLow(uint256 floor);

    constructor(address owner) Ownable(owner) {
        _set(150_000);
    }

    function setPairingGas(uint256 pairingGas_) external onlyOwner {
        _set(pairingGas_);
    }

    function _set(uint256 pairingGas_) private {
        if (pairingGas_ < PAIRING_GAS_FLOOR) revert PairingGasTooLow(PAIRING_GAS_FLOOR);
        pairingGas = pairingGas_;
        emit PairingGasSet(pairingGas_);
    }
}
