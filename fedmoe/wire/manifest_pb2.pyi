from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    FLOAT32: _ClassVar[DType]
    FLOAT64: _ClassVar[DType]
    FLOAT16: _ClassVar[DType]
    BFLOAT16: _ClassVar[DType]
    INT64: _ClassVar[DType]
    INT32: _ClassVar[DType]
    INT16: _ClassVar[DType]
    INT8: _ClassVar[DType]
    UINT8: _ClassVar[DType]
    BOOL: _ClassVar[DType]

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    RAW: _ClassVar[Encoding]
    SAME: _ClassVar[Encoding]
    BF16: _ClassVar[Encoding]
    INT8_BLOCKS: _ClassVar[Encoding]
    INT8_ZSTD: _ClassVar[Encoding]
    TOP_ZSTD: _ClassVar[Encoding]

class Job(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    JOB_UNSPECIFIED: _ClassVar[Job]
    TRAIN: _ClassVar[Job]
    SCOUT: _ClassVar[Job]
    EVALUATE: _ClassVar[Job]
    SERVE: _ClassVar[Job]
DTYPE_UNSPECIFIED: DType
FLOAT32: DType
FLOAT64: DType
FLOAT16: DType
BFLOAT16: DType
INT64: DType
INT32: DType
INT16: DType
INT8: DType
UINT8: DType
BOOL: DType
ENCODING_UNSPECIFIED: Encoding
RAW: Encoding
SAME: Encoding
BF16: Encoding
INT8_BLOCKS: Encoding
INT8_ZSTD: Encoding
TOP_ZSTD: Encoding
JOB_UNSPECIFIED: Job
TRAIN: Job
SCOUT: Job
EVALUATE: Job
SERVE: Job

class Manifest(_message.Message):
    __slots__ = ("protocol", "fedmoe", "run", "client", "groups", "query", "hello", "assignment", "update", "miss", "failure")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDMOE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    MISS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedmoe: str
    run: str
    client: int
    groups: _containers.RepeatedCompositeFieldContainer[Group]
    query: Query
    hello: Hello
    assignment: Assignment
    update: Update
    miss: Miss
    failure: Failure
    def __init__(self, protocol: _Optional[int] = ..., fedmoe: _Optional[str] = ..., run: _Optional[str] = ..., client: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[Group, _Mapping]]] = ..., query: _Optional[_Union[Query, _Mapping]] = ..., hello: _Optional[_Union[Hello, _Mapping]] = ..., assignment: _Optional[_Union[Assignment, _Mapping]] = ..., update: _Optional[_Union[Update, _Mapping]] = ..., miss: _Optional[_Union[Miss, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class ExpertId(_message.Message):
    __slots__ = ("layer", "expert")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert: int
    def __init__(self, layer: _Optional[int] = ..., expert: _Optional[int] = ...) -> None: ...

class Group(_message.Message):
    __slots__ = ("name", "sha256", "tensors", "held")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: bytes
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    held: bool
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[bytes] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., held: _Optional[bool] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "encoding", "block", "delta", "nbytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: DType
    shape: _containers.RepeatedScalarFieldContainer[int]
    encoding: Encoding
    block: int
    delta: bool
    nbytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[_Union[DType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., block: _Optional[int] = ..., delta: _Optional[bool] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Codec(_message.Message):
    __slots__ = ("int8", "top_k", "bf16")
    class Int8(_message.Message):
        __slots__ = ("block", "levels", "zstd")
        BLOCK_FIELD_NUMBER: _ClassVar[int]
        LEVELS_FIELD_NUMBER: _ClassVar[int]
        ZSTD_FIELD_NUMBER: _ClassVar[int]
        block: int
        levels: int
        zstd: bool
        def __init__(self, block: _Optional[int] = ..., levels: _Optional[int] = ..., zstd: _Optional[bool] = ...) -> None: ...
    class TopK(_message.Message):
        __slots__ = ("share",)
        SHARE_FIELD_NUMBER: _ClassVar[int]
        share: float
        def __init__(self, share: _Optional[float] = ...) -> None: ...
    class Bf16(_message.Message):
        __slots__ = ()
        def __init__(self) -> None: ...
    INT8_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    BF16_FIELD_NUMBER: _ClassVar[int]
    int8: Codec.Int8
    top_k: Codec.TopK
    bf16: Codec.Bf16
    def __init__(self, int8: _Optional[_Union[Codec.Int8, _Mapping]] = ..., top_k: _Optional[_Union[Codec.TopK, _Mapping]] = ..., bf16: _Optional[_Union[Codec.Bf16, _Mapping]] = ...) -> None: ...

class Query(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("num_examples", "memory_bytes", "task", "held", "key")
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    num_examples: int
    memory_bytes: int
    task: str
    held: _containers.RepeatedScalarFieldContainer[bytes]
    key: str
    def __init__(self, num_examples: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., task: _Optional[str] = ..., held: _Optional[_Iterable[bytes]] = ..., key: _Optional[str] = ...) -> None: ...

class Assignment(_message.Message):
    __slots__ = ("round", "job", "validate", "evaluate", "choose", "sub_moe", "reply_shared", "reply_experts")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    VALIDATE_FIELD_NUMBER: _ClassVar[int]
    EVALUATE_FIELD_NUMBER: _ClassVar[int]
    CHOOSE_FIELD_NUMBER: _ClassVar[int]
    SUB_MOE_FIELD_NUMBER: _ClassVar[int]
    REPLY_SHARED_FIELD_NUMBER: _ClassVar[int]
    REPLY_EXPERTS_FIELD_NUMBER: _ClassVar[int]
    round: int
    job: Job
    validate: bool
    evaluate: bool
    choose: int
    sub_moe: _containers.RepeatedCompositeFieldContainer[ExpertId]
    reply_shared: Codec
    reply_experts: Codec
    def __init__(self, round: _Optional[int] = ..., job: _Optional[_Union[Job, str]] = ..., validate: _Optional[bool] = ..., evaluate: _Optional[bool] = ..., choose: _Optional[int] = ..., sub_moe: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., reply_shared: _Optional[_Union[Codec, _Mapping]] = ..., reply_experts: _Optional[_Union[Codec, _Mapping]] = ...) -> None: ...

class Update(_message.Message):
    __slots__ = ("round", "base", "num_examples", "profile", "metrics", "held")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    round: int
    base: bytes
    num_examples: int
    profile: Profile
    metrics: _containers.RepeatedCompositeFieldContainer[Metric]
    held: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., base: _Optional[bytes] = ..., num_examples: _Optional[int] = ..., profile: _Optional[_Union[Profile, _Mapping]] = ..., metrics: _Optional[_Iterable[_Union[Metric, _Mapping]]] = ..., held: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Profile(_message.Message):
    __slots__ = ("layers", "experts", "count", "weight", "score", "token")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    layers: int
    experts: int
    count: _containers.RepeatedScalarFieldContainer[int]
    weight: _containers.RepeatedScalarFieldContainer[float]
    score: _containers.RepeatedScalarFieldContainer[float]
    token: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, layers: _Optional[int] = ..., experts: _Optional[int] = ..., count: _Optional[_Iterable[int]] = ..., weight: _Optional[_Iterable[float]] = ..., score: _Optional[_Iterable[float]] = ..., token: _Optional[_Iterable[int]] = ...) -> None: ...

class Metric(_message.Message):
    __slots__ = ("name", "value")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Miss(_message.Message):
    __slots__ = ("round", "hashes", "held")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    round: int
    hashes: _containers.RepeatedScalarFieldContainer[bytes]
    held: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, round: _Optional[int] = ..., hashes: _Optional[_Iterable[bytes]] = ..., held: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("round", "reason")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    round: int
    reason: str
    def __init__(self, round: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
