/* The part of PKCS#11 2.40 that call.go calls directly, written from the standard (sections 3 and 5). */
#ifndef NITROSEAL_CRYPTOKI_H
#define NITROSEAL_CRYPTOKI_H

typedef unsigned char CK_BYTE;
typedef unsigned long CK_ULONG;
typedef CK_ULONG CK_RV;

typedef struct {
	CK_BYTE major, minor;
} CK_VERSION;

typedef struct {
	CK_ULONG type;
	void *pValue;
	CK_ULONG ulValueLen;
} CK_ATTRIBUTE;

typedef struct {
	CK_ULONG mechanism;
	void *pParameter;
	CK_ULONG ulParameterLen;
} CK_MECHANISM;

typedef struct {
	CK_ULONG hashAlg, mgf, source;
	void *pSourceData;
	CK_ULONG ulSourceDataLen;
} CK_RSA_PKCS_OAEP_PARAMS;

typedef struct {
	CK_ULONG kdf, ulSharedDataLen;
	CK_BYTE *pSharedData;
	CK_ULONG ulPublicDataLen;
	CK_BYTE *pPublicData;
} CK_ECDH1_DERIVE_PARAMS;

/* The functions in the order of the standard. Version 3 appends to them and changes none. */
typedef struct {
	CK_VERSION version;
	void *C_Initialize, *C_Finalize, *C_GetInfo, *C_GetFunctionList;
	void *C_GetSlotList, *C_GetSlotInfo, *C_GetTokenInfo, *C_GetMechanismList, *C_GetMechanismInfo;
	void *C_InitToken, *C_InitPIN;
	CK_RV (*C_SetPIN)(CK_ULONG session, const CK_BYTE *old, CK_ULONG oldLen, const CK_BYTE *pin, CK_ULONG pinLen);
	void *C_OpenSession, *C_CloseSession, *C_CloseAllSessions, *C_GetSessionInfo, *C_GetOperationState, *C_SetOperationState;
	CK_RV (*C_Login)(CK_ULONG session, CK_ULONG user, const CK_BYTE *pin, CK_ULONG pinLen);
	void *C_Logout, *C_CreateObject, *C_CopyObject;
	CK_RV (*C_DestroyObject)(CK_ULONG session, CK_ULONG object);
	void *C_GetObjectSize;
	CK_RV (*C_GetAttributeValue)(CK_ULONG session, CK_ULONG object, CK_ATTRIBUTE *attributes, CK_ULONG count);
	void *C_SetAttributeValue, *C_FindObjectsInit, *C_FindObjects, *C_FindObjectsFinal;
	void *C_EncryptInit, *C_Encrypt, *C_EncryptUpdate, *C_EncryptFinal;
	CK_RV (*C_DecryptInit)(CK_ULONG session, CK_MECHANISM *mechanism, CK_ULONG key);
	CK_RV (*C_Decrypt)(CK_ULONG session, const CK_BYTE *in, CK_ULONG inLen, CK_BYTE *out, CK_ULONG *outLen);
	void *C_DecryptUpdate, *C_DecryptFinal, *C_DigestInit, *C_Digest, *C_DigestUpdate, *C_DigestKey, *C_DigestFinal;
	void *C_SignInit, *C_Sign, *C_SignUpdate, *C_SignFinal, *C_SignRecoverInit, *C_SignRecover;
	void *C_VerifyInit, *C_Verify, *C_VerifyUpdate, *C_VerifyFinal, *C_VerifyRecoverInit, *C_VerifyRecover;
	void *C_DigestEncryptUpdate, *C_DecryptDigestUpdate, *C_SignEncryptUpdate, *C_DecryptVerifyUpdate;
	void *C_GenerateKey, *C_GenerateKeyPair, *C_WrapKey, *C_UnwrapKey;
	CK_RV (*C_DeriveKey)(CK_ULONG session, CK_MECHANISM *mechanism, CK_ULONG base, CK_ATTRIBUTE *attributes, CK_ULONG count, CK_ULONG *key);
	void *C_SeedRandom;
	CK_RV (*C_GenerateRandom)(CK_ULONG session, CK_BYTE *out, CK_ULONG len);
	void *C_GetFunctionStatus, *C_CancelFunction, *C_WaitForSlotEvent;
} CK_FUNCTION_LIST;

#endif
