// SPDX-License-Identifier: MIT
pragma solidity ^0.8.28;

import {stdJson} from "forge-std/StdJson.sol";

import {CheckpointAnchor} from "../../src/CheckpointAnchor.sol";
import {PeerRegistry} from "../../src/PeerRegistry.sol";
import {Staking} from "../../src/Staking.sol";
import {ICheckpointAnchor} from "../../src/interfaces/ICheckpointAnchor.sol";
import {BLS12381} from "../../src/libraries/BLS12381.sol";
import {Swarm} from "../Swarm.sol";

/// @title A whole round with keys, proofs, digests, signature and rewards tree made by p2pflock.primitives.
contract VectorsTest is Swarm {
    using stdJson for string;

    string internal json = vm.readFile("test/vectors/chain.json");

    function test_pythonAndContractsAgree() public {
        vm.chainId(json.readUint(".chainId"));
        registry = PeerRegistry(json.readAddress(".registry"));
        deployCodeTo("PeerRegistry.sol:PeerRegistry", abi.encode(address(this)), address(registry));
        staking = new Staking(flock, registry, MINIMUM, COOLDOWN, sink, address(this));
        anchor = CheckpointAnchor(json.readAddress(".anchor"));
        deployCodeTo(
            "CheckpointAnchor.sol:CheckpointAnchor",
            abi.encode(registry, staking, tasks, EPOCH, LIFETIME, address(this)),
            address(anchor)
        );

        address[] memory who = json.readAddressArray(".operators");
        bytes[] memory peerIds = json.readBytesArray(".peerIds");
        bytes[] memory keys = json.readBytesArray(".keys");
        bytes[] memory proofs = json.readBytesArray(".proofs");
        bytes32[] memory roots = json.readBytes32Array(".possessionRoots");
        for (uint256 i; i < who.length; ++i) {
            assertEq(registry.possessionRoot(who[i], keccak256(peerIds[i]), keccak256(keys[i])), roots[i]);
            vm.prank(who[i]);
            registry.register(peerIds[i], keys[i], proofs[i]);
            _stake(who[i], MINIMUM);
        }

        bytes32 task = json.readBytes32(".task");
        _createTask(task);
        anchor.openEpoch(task, 0);
        ICheckpointAnchor.Checkpoint memory c = ICheckpointAnchor.Checkpoint({
            task: task,
            epoch: 0,
            round: uint64(json.readUint(".round")),
            view_: uint64(json.readUint(".view")),
            recordDigest: json.readBytes32(".recordDigest"),
            rewardsRoot: json.readBytes32(".rewardsRoot"),
            signers: json.readUint(".signers"),
            signature: json.readBytes(".signature")
        });
        assertEq(anchor.voteDigest(c, task), json.readBytes32(".vote"));
        anchor.anchor(c);
        assertEq(anchor.lineOf(task).head, json.readBytes32(".head"));

        // The escrow of this swarm pays its own `rewards` only, which reads another anchor: prove the leaf alone.
        bytes32 leaf = _leaf(task, who[json.readUint(".leafIndex")], json.readUint(".leafAmount"));
        bytes32[] memory proof = json.readBytes32Array(".leafProof");
        for (uint256 i; i < proof.length; ++i) {
            leaf = leaf < proof[i]
                ? keccak256(bytes.concat(leaf, proof[i]))
                : keccak256(bytes.concat(proof[i], leaf));
        }
        assertEq(leaf, c.rewardsRoot);
    }

    /// Any change of message, suite or gas is a refusal.
    function test_verifyDependsOnEveryBit() public {
        this.checkBits(json.readBytes(".keys[0]"), json.readBytes(".proofs[0]"));
    }

    function checkBits(bytes calldata key, bytes calldata proof) external view {
        uint256[4] memory point = abi.decode(key, (uint256[4]));
        bytes32 root = json.readBytes32(".possessionRoots[0]");
        assertTrue(BLS12381.verify(point, root, BLS12381.POSSESSION_DST, proof, 150_000));
        assertFalse(
            BLS12381.verify(point, root ^ bytes32(uint256(1)), BLS12381.POSSESSION_DST, proof, 150_000)
        );
        assertFalse(BLS12381.verify(point, root, BLS12381.SIGNATURE_DST, proof, 150_000));
        // Not enough gas is a refusal, never a pass on stale memory.
        assertFalse(BLS12381.verify(point, root, BLS12381.POSSESSION_DST, proof, 102_899));
    }
}
